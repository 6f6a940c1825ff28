"""Fleet: many adapters of one base model, squeezed together for one server and one memory budget."""
