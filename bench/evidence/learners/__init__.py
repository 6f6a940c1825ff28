"""Base models that learn tasks.

========  =======================================================================  ================================
name      model                                                                    tasks
========  =======================================================================  ================================
smollm2   SmolLM2-135M-Instruct, LoRA on every linear layer of every block         all text tasks
minilm    MiniLM-L6 with a new head, trained in full; LoRA on every linear layer   text tasks with classes
vlm       a vision tower and a projector before SmolLM2; both frozen               picture tasks
tiny      a random Llama of two layers that reads bytes                            text tasks, for tests of the bench
tiny-vlm  a random tower, projector and language model                             picture tasks, for tests
========  =======================================================================  ================================
"""

from __future__ import annotations

from functools import cache

from bench.evidence.learners.base import Learner

NAMES = ("smollm2", "minilm", "vlm", "tiny", "tiny-vlm")


@cache
def learner(name: str) -> Learner:
    """The one learner of this name in this process."""
    if name in ("smollm2", "tiny"):
        from bench.evidence.learners.causal import SmolLM2, Tiny

        return SmolLM2() if name == "smollm2" else Tiny()
    if name == "minilm":
        from bench.evidence.learners.encoder import MiniLM

        return MiniLM()
    if name in ("vlm", "tiny-vlm"):
        from bench.evidence.learners.vision import TinyVision, Vision

        return Vision() if name == "vlm" else TinyVision()
    raise SystemExit(f"no model {name!r}; there are {', '.join(NAMES)}")
