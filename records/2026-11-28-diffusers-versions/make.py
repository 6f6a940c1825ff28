"""python make.py FOLDER, with the repository's tests/ on the path: files of one rank, of mixed ranks, and without settings."""
import pathlib, sys

from diffusers_cases import MIXED, diffusers_file, read_diffusers, write_diffusers

from lora_squeeze.formats import diffusers

folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
adapter = diffusers.load(diffusers_file(folder / "source", MIXED))
adapter.squeeze(rank=2).save(folder / "one_rank.safetensors", force=True)
adapter.squeeze(energy=0.8).save(folder / "mixed_ranks.safetensors", force=True)
tensors, _ = read_diffusers(folder / "mixed_ranks.safetensors")
write_diffusers(folder / "mixed_ranks_no_settings.safetensors", tensors)
