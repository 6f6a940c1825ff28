"""In a file of its own: the process that holds the model has to find it by its name."""


def slot_bytes(model):
    """Bytes of the tensors that the layers of a model hold for adapters."""
    found = 0
    for module in model.modules():
        for name in ("lora_a_stacked", "lora_b_stacked"):
            stacked = vars(module).get(name, ())
            tensors = stacked if isinstance(stacked, (tuple, list)) else [stacked]
            found += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return found
