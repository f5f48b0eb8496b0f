"""Where a guard's probabilities come from: any scorer, and that of a model in this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from mergekit_align.checkpoints import context_window
from mergekit_align.guard.verdict import Logprobs, VerdictTree
from mergekit_align.reading import (
    BATCH_LOGITS,
    MIN_SHARED,
    Preamble,
    PromptBatch,
    may_share,
    vocabulary_size,
)
from mergekit_align.token_ids import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergekit_align.guard.prompt import Frame

T = TypeVar("T")

BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens that a batch reads, padding included; on a CPU as many as its caches like."""
CACHED_TOKENS = 65536
"""Tokens in a batch's key/value cache, those of the shared preamble included."""


class Score(NamedTuple):
    """What a guard makes of one prompt."""

    logprobs: Logprobs
    evidence: str
    """What the guard would rather say than any verdict, or why there is none."""


class Scorer(ABC):
    """A guard model that answers prompts of token ids."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    """Tokens of a prompt and its answer at most; `None` for no limit.

    One less than the context window: a server writes a token after what it reads.
    """

    @abstractmethod
    def scores(
        self, prompts: Sequence[Sequence[int]], tree: VerdictTree, *, preamble: TokenIds
    ) -> list[Score]:
        """Scores of `prompts`, in their order; those that begin with `preamble` share it."""

    @abstractmethod
    def categories(
        self, prompts: Sequence[Sequence[int]], frame: Frame, *, max_tokens: int
    ) -> list[tuple[str, ...]]:
        """Codes of what each of `prompts` violates, all of this frame and found unsafe."""

    @abstractmethod
    def texts(
        self, prompts: Sequence[Sequence[int]], *, preamble: TokenIds, max_tokens: int
    ) -> list[str]:
        """What the guard writes after each prompt, greedily.

        Raises:
            InputError: the backend cannot do it.
        """


class HuggingFaceScorer(Scorer):
    """A causal language model in this process.

    Args:
        batch_size: prompts in a batch at most; by default memory alone bounds it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        window = context_window(model.config)
        self.max_length = window and window - 1
        self._batch_size = batch_size
        self._preambles: dict[TokenIds, Preamble] = {}

    def scores(
        self, prompts: Sequence[Sequence[int]], tree: VerdictTree, *, preamble: TokenIds
    ) -> list[Score]:
        def read(batch: PromptBatch, size: int) -> list[Score]:
            found = batch.branches(tree.branches)
            # One transfer for all branches of all places.
            wanted = [(place, token) for place, tokens in tree.branches.items() for token in tokens]
            values = torch.cat([found[place] for place in tree.branches], 1).tolist()
            likeliest = batch.first[:, 0].max(1)
            tops = zip(likeliest.indices.tolist(), likeliest.values.exp().tolist(), strict=True)
            scores = []
            for row, (token, share) in zip(values, tops, strict=True):
                logprobs: dict[TokenIds, dict[int, float]] = {}
                for (place, branch), value in zip(wanted, row, strict=True):
                    logprobs.setdefault(place, {})[branch] = value
                said = self.tokenizer.decode([token])
                scores.append(Score(logprobs, f"found {said!r} ({share:.2f}) for a verdict"))
            return scores

        def lost(size: int) -> list[Score]:
            return [Score({}, "out of memory")] * size

        longest = max(len(place) for place in tree.branches)
        return self._by_batches(prompts, preamble, read, lost, after=longest)

    def categories(
        self, prompts: Sequence[Sequence[int]], frame: Frame, *, max_tokens: int
    ) -> list[tuple[str, ...]]:
        """The categories in the list that the guard writes, of `max_tokens` at most."""
        texts = self.texts(
            [[*prompt, *frame.category_start] for prompt in prompts],
            preamble=frame.preamble,
            max_tokens=max_tokens,
        )
        return [frame.codes_in(text) for text in texts]

    def texts(
        self, prompts: Sequence[Sequence[int]], *, preamble: TokenIds, max_tokens: int
    ) -> list[str]:
        def read(batch: PromptBatch, size: int) -> list[str]:
            written = batch.greedy(max_tokens, self.tokenizer.eos_token_id)
            return [str(text) for text in self.tokenizer.batch_decode(written)]

        def lost(size: int) -> list[str]:
            return [""] * size

        return self._by_batches(prompts, preamble, read, lost, after=max_tokens)

    def _by_batches(
        self,
        prompts: Sequence[Sequence[int]],
        preamble: TokenIds,
        read: Callable[[PromptBatch, int], list[T]],
        lost: Callable[[int], list[T]],
        *,
        after: int,
    ) -> list[T]:
        """`read` of every prompt and of `after` tokens more; a batch that exhausts memory is halved.

        What does not fit alone is `lost`.
        """
        shared = self._preamble(preamble) if len(preamble) >= MIN_SHARED else None

        def attempt(rows: Sequence[int], known: Preamble | None) -> list[T]:
            try:
                batch = PromptBatch(self.model, [prompts[row] for row in rows], known)
                return read(batch, len(rows))
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            # Outside the handler, whose traceback keeps the batch's tensors alive.
            if len(rows) == 1:
                return lost(1)
            half = len(rows) // 2
            return [*attempt(rows[:half], known), *attempt(rows[half:], known)]

        results: dict[int, T] = {}
        begins = [
            shared is not None
            and shared.begins(prompt)
            and may_share(self.model, len(prompt) + after)
            for prompt in prompts
        ]
        for known in (shared, None):
            rows = [row for row, begun in enumerate(begins) if begun == (known is not None)]
            for batch in self._batches(prompts, rows, len(known.ids) if known else 0):
                results.update(zip(batch, attempt(batch, known), strict=True))
        return [results[row] for row in range(len(prompts))]

    def _batches(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int], known: int
    ) -> Iterator[list[int]]:
        """Batches of `rows`, the longest prompts first."""
        budget = BATCH_TOKENS.get(self.model.device.type, 8192)
        vocabulary = vocabulary_size(self.model)
        batch: list[int] = []
        for row in sorted(rows, key=lambda each: len(prompts[each]), reverse=True):
            texts, longest = len(batch) + 1, len(prompts[batch[0] if batch else row])
            fits = (
                texts * (longest - known) <= budget
                and texts * longest <= CACHED_TOKENS
                and texts * vocabulary <= BATCH_LOGITS
                and (self._batch_size is None or texts <= self._batch_size)
            )
            if batch and not fits:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _preamble(self, ids: TokenIds) -> Preamble:
        if ids not in self._preambles:
            self._preambles[ids] = Preamble(self.model, ids)
        return self._preambles[ids]
