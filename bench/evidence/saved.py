"""Adapters by way of files, as a user squeezes them: saved by PEFT, squeezed or converted, loaded by PEFT again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lora_squeeze
from bench.evidence.data import Data
from bench.evidence.learners.base import Learner
from lora_squeeze.moments import Moments
from lora_squeeze.sources import open_source

Small = tuple[float, Any]  # energy kept, PEFT model


class Source:
    """A trained adapter in a folder.

    The live model is gone as soon as something smaller is attached: a learner has one adapter at a time.
    """

    def __init__(self, learner: Learner, data: Data, folder: Path, seed: int) -> None:
        self.learner, self.data, self.folder, self.seed = learner, data, folder, seed

    def squeezed(self, rank: int, allocate: str, moments: Mapping[str, Moments] | None) -> Small:
        """A LoRA squeezed to a rank, or to its parameters."""
        adapter = lora_squeeze.load(self.folder)
        return self._attach(lora_squeeze.squeeze(adapter, rank=rank, allocate=allocate, moments=moments))

    def converted(self, ranks: Sequence[int]) -> Iterator[tuple[int, Small]]:
        """An adapter of any method as plain LoRAs."""
        adapter = open_source(self.folder, base=self.learner.base_folder())
        # All before the first is attached: the base may have to be loaded again for that.
        small = [(rank, lora_squeeze.convert(adapter, "peft", rank=rank)) for rank in ranks]
        for rank, adapter in small:
            yield rank, self._attach(adapter)

    def _attach(self, adapter: Any) -> Small:
        from peft import LoraConfig, PeftConfig, load_peft_weights, set_peft_model_state_dict

        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder, "small")
            adapter.save(home)
            config = PeftConfig.from_pretrained(home)
            if not isinstance(config, LoraConfig):
                raise SystemExit(f"a plain LoRA was expected, found {config.peft_type}")
            config.inference_mode = False
            model = self.learner.attach(config, self.data, self.seed)
            self.learner.narrow(model)
            set_peft_model_state_dict(model, load_peft_weights(str(home), device=str(self.learner.device)))
        return float(adapter.report.energy), model


@contextmanager
def saved(learner: Learner, data: Data, model: Any, seed: int) -> Iterator[Source]:
    """A live model as a source, for as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield Source(learner, data, Path(folder), seed)


def configuration(name: str, options: Mapping[str, Any], learner: Learner) -> Any:
    """PEFT's configuration of a method, of its own or of this package.

    Args:
        name: of the method, such as "VERA" or "NOLA small", of which only the first word counts.
        options: further settings; target_modules is that of the learner unless given.

    Raises:
        SystemExit: PEFT knows no such method.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import lora_squeeze.methods.adapters
    import lora_squeeze.methods.ranks  # noqa: F401 (both register their methods with PEFT)

    known = {str(getattr(kind, "value", kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = name.split()[0].upper()
    if kind not in known:
        raise SystemExit(f"PEFT has no method {name!r}; there are {', '.join(sorted(known))}")
    settings = {"target_modules": learner.targets, "task_type": learner.task_type, **options}
    return known[kind](**settings)
