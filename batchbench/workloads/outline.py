"""The outline of a workload: how long and when, before any prompt is made up."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from batchbench.errors import UsageError
from batchbench.workloads.prompts import BLOCK_TOKENS, random_prompts
from batchbench.workloads.ragged import Ints, Ragged
from batchbench.workloads.request import Workload


@dataclass(frozen=True, eq=False)
class Outline:
    """A workload without the ids of random prompts; columns are ``[requests]``.

    ``prompts`` are known (a text's tokens) or None: random ones, the first ``shared`` tokens of
    which are the same in all, and whose ``blocks`` of ``block_tokens`` tokens may have names.
    """

    name: str
    seed: int
    prompt_tokens: Ints
    output_tokens: Ints
    due_ns: Ints
    prompts: Ragged | None = None
    blocks: Ragged | None = None
    block_tokens: int = BLOCK_TOKENS
    shared: int = 0
    arrivals: str = "all at once"  # for people
    stop_at_eos: bool = False
    max_concurrency: int | None = None

    def __len__(self) -> int:
        return len(self.output_tokens)

    def workload(self, vocab_size: int) -> Workload:
        """The workload: ids of random prompts are drawn, known ones taken modulo the vocabulary.

        Raises:
            UsageError: its prompts do not fit in memory.
        """
        if self.prompts is not None:
            ids = self.prompts.values.astype(np.int32, copy=False)
            ids = ids % vocab_size if ids.max() >= vocab_size else ids
        else:
            ids = random_prompts(
                self.prompt_tokens,
                seed=self.seed,
                vocab_size=vocab_size,
                shared=self.shared,
                blocks=self.blocks,
                block_tokens=self.block_tokens,
            )
        return Workload(
            name=self.name,
            seed=self.seed,
            prompt_ids=ids,
            prompt_offsets=np.concatenate([[0], np.cumsum(self.prompt_tokens)]).astype(np.int64),
            output_tokens=self.output_tokens,
            due_ns=self.due_ns,
            stop_at_eos=self.stop_at_eos,
            max_concurrency=self.max_concurrency,
        )

    def beyond(self, context: int | None, model: str) -> list[str]:
        """A line where requests are longer than a model's context; none where all fit."""
        long = (
            0 if context is None else int((self.prompt_tokens + self.output_tokens > context).sum())
        )
        if not long:
            return []
        return [
            f"{long:,} of {len(self):,} requests exceed the {context:,} tokens that {model} takes; "
            "say --overlong clip, scale or skip"
        ]

    def with_lengths(self, prompt_tokens: Ints, output_tokens: Ints) -> Outline:
        """The same requests, shorter: known prompts keep their beginnings."""
        rows = np.arange(len(self))
        prompts = None if self.prompts is None else self.prompts.take(rows, prompt_tokens)
        return replace(
            self, prompt_tokens=prompt_tokens, output_tokens=output_tokens, prompts=prompts
        )

    def take(self, rows: Ints) -> Outline:
        """Some of the requests."""
        return replace(
            self,
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            due_ns=self.due_ns[rows],
            prompts=self.prompts and self.prompts.take(rows),
            blocks=self.blocks and self.blocks.take(rows),
        )


def fit(
    outline: Outline, context: int | None, overlong: str, bound: int | None = None
) -> tuple[Outline, str | None]:
    """The outline within a model's context, and a line that says what was done, if anything.

    Args:
        context: tokens that the model takes, prompt and output together; None is no limit.
        overlong: ``clip`` cuts outputs to what the prompt leaves, and a prompt that leaves nothing
            to one token less than the context; ``scale`` multiplies all lengths by one factor;
            ``skip`` leaves such requests out; ``error`` does nothing.
        bound: tokens that no request of this kind exceeds, whatever the seed: what ``scale`` goes
            by instead of the longest request.

    Raises:
        UsageError: no request is left.
    """
    prompt, output = outline.prompt_tokens, outline.output_tokens
    total = prompt + output
    if context is None or overlong == "error":
        return outline, None
    long = int((total > context).sum())
    if overlong == "scale":
        longest = bound or int(total.max())
        if longest <= context:
            return outline, None
        # Whole-number arithmetic: the sum of both floors never exceeds the context.
        scaled = [np.maximum(1, lengths * context // longest) for lengths in (prompt, output)]
        told = f"lengths are scaled by {context / longest:.3g}"
        return outline.with_lengths(*scaled), f"{told}, so that the longest fits {context:,} tokens"
    if not long:
        return outline, None
    if overlong == "clip":
        kept = np.minimum(prompt, context - 1)
        clipped = outline.with_lengths(kept, np.minimum(output, context - kept))
        return clipped, f"requests clipped to the {context:,} tokens of the context: {long:,}"
    if long == len(outline):
        raise UsageError(
            f"--overlong skip: every request exceeds the {context} tokens of the "
            "context; take --overlong clip or scale"
        )
    told = f"requests longer than the {context:,} tokens of the context, left out: {long:,}"
    return outline.take(np.flatnonzero(total <= context)), told
