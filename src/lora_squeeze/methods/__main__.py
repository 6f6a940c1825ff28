"""Write the catalogue into README and docs: `python -m lora_squeeze.methods`, in a clone of the repository."""

from pathlib import Path

from lora_squeeze.methods.catalogue import write_into

root = Path(__file__).parents[3]
write_into(root / "README.md", ".")
write_into(root / "docs" / "methods.md", "")
