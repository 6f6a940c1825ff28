"""What PEFT says: the probabilities that transformers and PEFT give to the tokens that an engine wrote.

Nothing is generated here. If every token of an engine's answer is the likeliest one after the tokens before it, then
the answer is PEFT's own greedy answer, by induction over the tokens; so one forward pass judges a whole answer, and the
logarithms of the probabilities are compared at every token on the way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NEAR = 1e-3  # two programs that compute the same function in float32, in the logarithm of a probability
FAR = 100 * NEAR  # two functions


@dataclass(frozen=True)
class Answer:
    """What an engine said to one prompt.

    Args:
        prompt: token ids of the prompt.
        tokens: token ids of the answer, with the end-of-text token if it ended there.
        log_probs: for each token of the answer, token id -> logarithm of its probability, for the likeliest ones.
    """

    prompt: list[int]
    tokens: list[int]
    log_probs: list[dict[int, float]]

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> "Answer":
        """As the workers write it; JSON has made text of the token ids that are keys."""
        rows = [{int(token): value for token, value in row.items()} for row in said["log_probs"]]
        return cls(said["prompt"], said["tokens"], rows)


@dataclass(frozen=True)
class Agreement:
    """How answers compare with the reference.

    Args:
        tokens: number of tokens compared.
        apart: the largest difference of a logarithm of a probability.
        behind: by how much, at most, a token that the engine chose is less likely than the likeliest; 0 where the
            answers are the greedy ones.
    """

    tokens: int
    apart: float
    behind: float


@dataclass
class Reference:
    """A base model of transformers, to which PEFT adapters are attached one at a time."""

    model: Any
    tokenizer: Any

    def prompt(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def compare(self, adapter: Path | None, answers: Sequence[Answer]) -> Agreement:
        """Compare answers with what PEFT says with this adapter (None: without any)."""
        apart, behind, count = 0.0, 0.0, 0
        for answer, expected in zip(answers, self._log_probs(adapter, answers), strict=True):
            for token, said, row in zip(answer.tokens, answer.log_probs, expected, strict=True):
                apart = max(apart, *(abs(value - float(row[other])) for other, value in said.items()))
                behind = max(behind, float(row.max() - row[token]))
                count += 1
        return Agreement(count, apart, behind)

    def check(self, adapter: Path | None, prompts: Sequence[str], answers: Sequence[Answer], tokens: int) -> None:
        """These are PEFT's greedy answers to the prompts with this adapter, and its probabilities; prints the figures.

        Args:
            adapter: a PEFT folder; None: the base model.
            prompts: what was asked.
            answers: what the engine said.
            tokens: length of an answer, unless it ends with the end-of-text token.
        """
        found = self.compare(adapter, answers)
        print(found)
        assert [answer.prompt for answer in answers] == [self.prompt(text) for text in prompts]
        end = self.tokenizer.eos_token_id
        whole = [len(answer.tokens) == tokens or answer.tokens[-1:] == [end] for answer in answers]
        assert all(whole), f"answers that stop too early: {[a.tokens for a in answers]}"
        # A token may be less likely than the likeliest one by a rounding error: where two are equally likely.
        assert found.behind < NEAR, f"not the greedy answers: {found}"
        assert found.apart < NEAR, f"other probabilities: {found}"

    @torch.no_grad()
    def _log_probs(self, adapter: Path | None, answers: Sequence[Answer]) -> list[Tensor]:
        """For each answer, a row over the vocabulary for each of its tokens."""
        longest = max(len(answer.prompt) + len(answer.tokens) for answer in answers)
        rows = [answer.prompt + answer.tokens for answer in answers]
        # Filled up on the right, where no token of the answer sees it.
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        logits = self._forward(adapter, ids).float()
        return [
            logits[i, len(answer.prompt) - 1 : len(answer.prompt) + len(answer.tokens) - 1].log_softmax(dim=-1)
            for i, answer in enumerate(answers)
        ]

    def _forward(self, adapter: Path | None, ids: Tensor) -> Tensor:
        from peft import PeftModel

        if adapter is None:
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return found
        adapted = PeftModel.from_pretrained(self.model, adapter).eval()
        try:
            found = adapted(input_ids=ids, use_cache=False).logits
        finally:
            self.model = adapted.unload()
        return found
