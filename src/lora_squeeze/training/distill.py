"""Distillation: the squeezed adapter learns from the one that it was squeezed from. No labels are needed.

Teacher and student are two adapters of one base model in memory. With z and z' their logits at one position, the loss
is the forward divergence of their distributions of the next token, averaged over the positions that count:

    loss = mean over positions of T^2 KL(softmax(z / T) || softmax(z' / T))        T: temperature

The factor T^2 keeps the size of the gradients when T changes. What counts are the tokens of a text, or of the teacher's
own completion of a prompt. What a text says next is never the target: the target is what the teacher expects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GenerationConfig
from trl.trainer.sft_trainer import SFTTrainer

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.modes import evaluating
from lora_squeeze.training.live import holder_of

TEACHER = "teacher"
IGNORED = -100  # the label of a position that does not count


def kl_divergence(
    teacher: Float[Tensor, "rows vocabulary"], student: Float[Tensor, "rows vocabulary"], temperature: float = 1.0
) -> Float[Tensor, " rows"]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row, in float32 and in nats.

    Args:
        teacher: logits, taken as constants.
        student: logits.
        temperature: T, above 0; a higher one gives more weight to unlikely tokens.

    Notes:
        Holds a few copies of rows x vocabulary numbers; where that is too much, take fewer examples at once.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 6.0]]))  # a constant changes nothing
        tensor([0.])
    """
    p = (teacher.detach().float() / temperature).log_softmax(-1)
    q = (student.float() / temperature).log_softmax(-1)
    return temperature**2 * nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def add_teacher(model: Any, folder: str) -> None:
    """Load an adapter a second time, frozen, under the name `TEACHER`; the one that is trained stays active.

    Args:
        model: a PEFT model.
        folder: the adapter's folder or hub id.
    """
    student = model.active_adapter
    model.load_adapter(folder, TEACHER, is_trainable=False)
    model.set_adapter(student)


@contextmanager
def as_teacher(model: Any) -> Iterator[None]:
    """The teacher is active inside, in eval mode and without gradients; afterwards the adapter that was, trainable.

    PEFT's set_adapter switches requires_grad together with the adapter: off for the student inside, on again after.
    """
    student = model.active_adapter
    with torch.no_grad(), evaluating(model):
        model.set_adapter(TEACHER, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(student)


class DistillTrainer(SFTTrainer):
    """An SFTTrainer whose loss is the divergence from the teacher; see the top of this module.

    Args:
        temperature: T.
        others: arguments of SFTTrainer. The model has a frozen adapter named `TEACHER`, see `add_teacher`. Labels only
            say which positions count.
    """

    def __init__(self, *others: Any, temperature: float = 1.0, **named: Any) -> None:
        super().__init__(*others, **named)
        self.temperature = temperature
        trained: Any = self.model
        if TEACHER not in holder_of(trained).peft_config:
            raise LoraSqueezeError(f"the model has no adapter {TEACHER!r}; load it with add_teacher(model, folder)")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The divergence of one batch: teacher first, so that what gradient checkpointing computes again is ours."""
        counted = inputs["labels"][:, 1:] != IGNORED
        read = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
        plain = self.accelerator.unwrap_model(model)
        with as_teacher(plain):
            expected = plain(**read).logits[:, :-1][counted]
        outputs = model(**read)
        divergence = kl_divergence(expected, outputs.logits[:, :-1][counted], self.temperature).sum()
        count = counted.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = divergence / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients, the count is that of all processes
        return (loss, outputs) if return_outputs else loss


def prompts_of(rows: Any, form: Sequence[str]) -> list[Any]:
    """The prompts in a data set: the column of that name, or conversations without the answer at their end.

    Args:
        rows: a datasets.Dataset.
        form: its columns, ("prompt",) or ("messages",).
    """
    found = list(rows[form[0]])
    return [prompt if isinstance(prompt, str) else _unanswered(prompt) for prompt in found]


def _unanswered(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = max((i for i, message in enumerate(messages) if message["role"] != "assistant"), default=-1)
    return messages[: last + 1]


def complete_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Any], *, new_tokens: int, max_length: int, batch_size: int
) -> list[dict[str, list[int]]]:
    """What the teacher answers, greedily, token by token.

    Args:
        model: a PEFT model with an adapter `TEACHER`.
        tokenizer: its tokenizer, with a token for padding.
        prompts: texts, or lists of messages.
        new_tokens: most tokens of an answer; it ends earlier where the teacher ends it.
        max_length: most tokens of prompt and answer together; longer prompts are left out.
        batch_size: prompts at once.

    Returns:
        For each prompt the tokens of prompt and answer, and labels that count the answer only: rows for a trainer.

    Raises:
        LoraSqueezeError: no prompt is short enough.
    """
    tokens = [_tokens(tokenizer, prompt) for prompt in prompts if prompt]
    fitting = [row for row in tokens if 0 < len(row) <= max_length - new_tokens]
    if not fitting:
        raise LoraSqueezeError(
            f"none of {len(tokens)} prompts has from 1 to {max_length - new_tokens} tokens, the length of "
            f"{max_length} less {new_tokens} new ones; raise max_length or lower generate"
        )
    rows = []
    with as_teacher(model):
        for start in range(0, len(fitting), batch_size):
            batch = fitting[start : start + batch_size]
            for prompt, answer in zip(batch, _answers(model, tokenizer, batch, new_tokens), strict=True):
                rows.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return rows


def _tokens(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        found: list[int] = tokenizer(prompt)["input_ids"]
    else:
        found = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    return found


def _answers(model: Any, tokenizer: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    device, width = model.device, max(map(len, prompts))
    missing = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[tokenizer.pad_token_id] * m + p for m, p in zip(missing, prompts, strict=True)], device=device)
    mask = torch.tensor([[0] * m + [1] * len(p) for m, p in zip(missing, prompts, strict=True)], device=device)
    ends = _ends(model, tokenizer)
    how = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends)
    )
    written = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)[:, width:].tolist()
    return [_ended(answer, ends) for answer in written]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: those of the model, which may have several, and that of the tokenizer."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])}


def _ended(answer: list[int], ends: set[int]) -> list[int]:
    """Up to the first end, which belongs to it: what follows is padding."""
    stop = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[: stop + 1]
