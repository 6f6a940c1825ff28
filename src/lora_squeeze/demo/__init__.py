"""The demonstration: train a LoRA of a small language model at a high rank, squeeze it, measure what each rank keeps.

run.py        the whole demonstration, through the calls that a user makes
settings.py   how much is trained and measured, and on which device
model.py      where the language model comes from
task.py       the data: spelling to pronunciation
train.py      a plain PyTorch loop around a PEFT model
evaluate.py   loss and accuracy on held-out words
result.py     the figures, as table and as JSON
plot.py       the figures, as picture
"""

from lora_squeeze.demo.result import DemoResult as DemoResult
from lora_squeeze.demo.run import run_demo as run_demo

__all__ = ["DemoResult", "run_demo"]
