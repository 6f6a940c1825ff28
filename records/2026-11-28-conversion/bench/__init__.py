"""Measurements of lora_squeeze against other ways to do the same, and against the least work that there is to do.

Run from the repository root: `python -m bench.speed`. Nothing here is imported by the package.

One thread for every process: the variables below are read when torch is loaded, so this module comes before it.
"""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
