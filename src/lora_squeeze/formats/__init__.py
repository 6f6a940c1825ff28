"""File formats: one module per format, each reads and writes."""
