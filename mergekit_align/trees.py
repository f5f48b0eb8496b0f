"""Prompts and what may follow them as trees of token ids, so that no beginning is read twice.

A tree is one row of a batch: the tokens of all its texts, each once, in the order of a walk that
follows one text to its end before the next. A token has the position that it has in its text, and sees
only the tokens that lead to it (tree attention: Miao et al. 2024, SpecInfer, arXiv 2305.09781). So
prompts that begin alike share that, a prompt's responses and openings share the prompt, and all is one
forward pass. What all prompts of a batch begin with, where it is long, is a `reading.Preamble`.

A model whose layers see more than a mask of attention (recurrent ones, windows shorter than the
texts) reads each text as a row of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from mergekit_align.reading import MIN_SHARED, may_share
from mergekit_align.token_ids import common_length, longest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TREE_TOKENS = 96
"""Tokens of a tree of several short texts: each sees all others, if only to leave them out."""
SMALL_BATCH = {"cpu": 256}
"""Tokens, by device, up to which a batch is worth its padding: a pass takes hardly longer for them."""
MOST_PADDING = 0.2
"""Share of padding in a larger batch."""
MOST_KNOWN = 4
"""Tokens of what a batch's rows share, a copy for each, by those that are read."""


class Query(NamedTuple):
    """A prompt, and the continuations whose probability is asked for."""

    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]
    """Of one token or more each."""


class Budget(NamedTuple):
    """What a batch may take."""

    tokens: int
    """Padding included."""
    predictions: int | None = None
    """Places at which the vocabulary's logits are wanted."""
    rows: int | None = None


class TreeBatch(NamedTuple):
    """Queries that are read together."""

    queries: list[int]
    """Their places among all."""
    shared: list[int]
    """What their prompts begin with, read before and not among `ids`; may be nothing."""
    ids: torch.Tensor
    """Token ids [rows, tokens], 0 where padded."""
    positions: torch.Tensor
    """Of `ids` in their texts, [rows, tokens]."""
    read: torch.Tensor
    """1 for what is read, 0 for padding, [rows, tokens]."""
    ends: torch.Tensor | None
    """The last place of the row that sees a token [rows, tokens]; `None` where each row is one text."""
    places: torch.Tensor
    """Where something is predicted, in the rows joined end to end, [predictions]."""
    asked: torch.Tensor
    """The prediction in which a token's probability is asked for, [asked]."""
    tokens: torch.Tensor
    """These tokens, [asked]."""
    owners: torch.Tensor
    """The continuation to which each belongs, counted over all queries, [asked]."""

    @property
    def continuations(self) -> int:
        """How many there are of all queries."""
        return int(self.owners[-1]) + 1

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each continuation, [continuations]."""
        return self.owners.bincount()

    def mask(self, model: PreTrainedModel) -> torch.Tensor:
        """What each token sees, as transformers takes it.

        Of trees, [rows, 1, tokens, `shared` and tokens]: for PyTorch's attention whether it is seen,
        for others what is added to the scores, 0 or the least number. Else 1 for what is read
        [rows, tokens].
        """
        if self.ends is None:
            return self.read
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        reader = place.unsqueeze(1)
        seen = (place <= reader) & (reader <= self.ends.unsqueeze(1))
        seen = pad(seen, (len(self.shared), 0), value=True).unsqueeze(1)
        if model.config.get_text_config()._attn_implementation == "sdpa":
            return seen
        least = torch.finfo(model.dtype).min
        return torch.zeros_like(seen, dtype=model.dtype).masked_fill_(~seen, least)


def reads_trees(model: PreTrainedModel, tokens: int) -> bool:
    """Whether nothing but an attention mask tells the model what a token sees.

    Args:
        tokens: of the longest text.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        getattr(model, "_supports_attention_backend", False)
        and not getattr(model, "_is_stateful", False)
        and config._attn_implementation in ("eager", "sdpa")
        and kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
        and may_share(model, tokens)
        and "position_ids" in inspect.signature(model.forward).parameters
    )


def plan_batches(
    model: PreTrainedModel, queries: Sequence[Query], budget: Budget
) -> Iterator[TreeBatch]:
    """All queries, each in one batch."""
    if not queries:
        return
    longest_text = max(
        len(prompt) + max(len(each) for each in continuations) for prompt, continuations in queries
    )
    if not reads_trees(model, longest_text):
        plain = [_plain(index, query) for index, query in enumerate(queries)]
        yield from _batches(plain, [], budget, model.device, trees=False)
        return
    for shared, members in _beginnings([query.prompt for query in queries]):
        known, trees = shared, _trees(queries, members, len(shared))
        if len(trees) == 1:  # it shares that anyhow
            known, trees = [], _trees(queries, members, 0)
        yield from _batches(trees, known, budget, model.device, trees=True)


def _beginnings(prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
    """Groups of prompts, each as what all of its prompts begin with, and their places.

    Prompts that share `MIN_SHARED` token ids or more are a group; the rest are one that shares nothing.
    Every prompt goes on after what it shares.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt[:MIN_SHARED]), []).append(index)
    shared: list[tuple[list[int], list[int]]] = []
    alone: list[int] = []
    for members in groups.values():
        own = [prompts[index] for index in members]
        same = min(common_length(own), *(len(prompt) - 1 for prompt in own))
        if len(members) > 1 and same >= MIN_SHARED:
            shared.append((list(own[0][:same]), members))
        else:
            alone += members
    return [*shared, ([], alone)] if alone else shared


class _Row:
    """Texts in one row; one after another, they share what they begin with."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.depths: list[int] = []
        self.last: list[int] = []
        """The text that was added last."""
        self._path: list[int] = []

    def add(self, text: list[int], known: int) -> list[int]:
        """The places of a text's tokens, of which as many as `known` are the last text's too."""
        self._path[known:] = range(len(self.ids), len(self.ids) + len(text) - known)
        self.last = text
        self.ids += text[known:]
        self.depths += range(known, len(text))
        return list(self._path)

    def ends(self) -> list[int]:
        """By place, the last one that sees it: all that follow and are deeper do."""
        ends = [len(self.ids) - 1] * len(self.ids)
        path: list[int] = []
        for place, depth in enumerate(self.depths):
            for ended in path[depth:]:
                ends[ended] = place - 1
            path[depth:] = [place]
        return ends


class _Bundle(NamedTuple):
    """Rows that are read together: one tree, or the texts of one query."""

    rows: list[_Row]
    asked: dict[int, list[tuple[int, list[int]]]]
    """By query, for each continuation, the row and the places where its tokens are predicted."""
    tokens: list[int]
    """What is predicted there, all in one."""

    @property
    def width(self) -> int:
        return max(len(row.ids) for row in self.rows)

    @property
    def predictions(self) -> int:
        return len({(r, n) for each in self.asked.values() for r, own in each for n in own})


def _trees(queries: Sequence[Query], members: Sequence[int], known: int) -> list[_Bundle]:
    """Trees of queries, without the first `known` tokens."""
    trees: list[_Bundle] = []
    row: _Row | None = None
    for index in sorted(members, key=lambda each: list(queries[each].prompt)):
        prompt, continuations = list(queries[index].prompt[known:]), queries[index].continuations
        texts = sorted({tuple(each[:-1]) for each in continuations})
        shared = [common_length(pair) for pair in pairwise(texts)]
        size = len(prompt) + sum(map(len, texts)) - sum(shared)
        room = max(TREE_TOKENS, size * 3 // 2) - size
        same = common_length([row.last, [*prompt, *texts[0]]]) if row else 0
        if row is None or len(row.ids) - min(same, len(prompt)) > room:
            row, same = _Row(), 0
            trees.append(_Bundle([row], {}, []))
        begun = [same, *(len(prompt) + each for each in shared)]
        places = {
            text: row.add([*prompt, *text], each)[len(prompt) - 1 :]
            for text, each in zip(texts, begun, strict=True)
        }
        trees[-1].asked[index] = [(0, places[tuple(each[:-1])]) for each in continuations]
        trees[-1].tokens.extend(chain(*continuations))
    return trees


def _plain(index: int, query: Query) -> _Bundle:
    """A query's texts, each in a row of its own."""
    prompt = list(query.prompt)
    texts = longest({tuple(each[:-1]) for each in query.continuations})
    rows = [_Row() for _ in texts]
    for row, text in zip(rows, texts, strict=True):
        row.add([*prompt, *text], 0)
    asked = []
    for each in query.continuations:
        inner = tuple(each[:-1])
        row_of = next(n for n, text in enumerate(texts) if text[: len(inner)] == inner)
        asked.append((row_of, list(range(len(prompt) - 1, len(prompt) + len(inner)))))
    return _Bundle(rows, {index: asked}, [*chain(*query.continuations)])


class _Size(NamedTuple):
    """What bundles take together, the widest of which is the first."""

    width: int = 0
    rows: int = 0
    read: int = 0
    predictions: int = 0

    def grown(self, bundle: _Bundle) -> _Size:
        return _Size(
            self.width or bundle.width,
            self.rows + len(bundle.rows),
            self.read + sum(len(row.ids) for row in bundle.rows),
            self.predictions + bundle.predictions,
        )

    def fits(self, budget: Budget, known: int, device: torch.device) -> bool:
        padded, small = self.rows * self.width, SMALL_BATCH.get(device.type, budget.tokens)
        return (
            padded <= budget.tokens
            and (padded <= small or padded - self.read <= MOST_PADDING * padded)
            and self.rows * known <= MOST_KNOWN * budget.tokens
            and (budget.predictions is None or self.predictions <= budget.predictions)
            and (budget.rows is None or self.rows <= budget.rows)
        )


def _batches(
    bundles: Sequence[_Bundle],
    shared: list[int],
    budget: Budget,
    device: torch.device,
    *,
    trees: bool,
) -> Iterator[TreeBatch]:
    """Batches of bundles that go on after `shared`, the widest first."""
    batch: list[_Bundle] = []
    size = _Size()
    for bundle in sorted(bundles, key=lambda each: each.width, reverse=True):
        grown = size.grown(bundle)
        if batch and not grown.fits(budget, len(shared), device):
            yield _tensors(batch, shared, device, trees=trees)
            batch, grown = [], _Size().grown(bundle)
        batch.append(bundle)
        size = grown
    yield _tensors(batch, shared, device, trees=trees)


def _tensors(
    bundles: Sequence[_Bundle], shared: list[int], device: torch.device, *, trees: bool
) -> TreeBatch:
    rows = [row for bundle in bundles for row in bundle.rows]
    width = max(len(row.ids) for row in rows)
    table = np.zeros((4, len(rows), width), dtype=np.int64)
    table[3] = np.arange(width)
    for n, row in enumerate(rows):
        table[:, n, : len(row.ids)] = row.ids, row.depths, [1] * len(row.ids), row.ends()
    ids, positions, read, ends = torch.from_numpy(table)
    places: list[int] = []
    owners: list[int] = []
    continuations = first = 0
    for bundle in bundles:
        for row_of, own in chain(*bundle.asked.values()):
            places += [(first + row_of) * width + place for place in own]
            owners += [continuations] * len(own)
            continuations += 1
        first += len(bundle.rows)
    predicted, asked = torch.unique(torch.tensor(places), return_inverse=True)
    return TreeBatch(
        [index for bundle in bundles for index in bundle.asked],
        shared,
        ids.to(device),
        (positions + len(shared)).to(device),
        read.to(device),
        ends.to(device) if trees else None,
        predicted.to(device),
        asked.to(device),
        torch.tensor([token for bundle in bundles for token in bundle.tokens]).to(device),
        torch.tensor(owners).to(device),
    )
