"""Prompts and what may follow them as trees of token ids, so that no beginning is read twice.

A tree is one row of a batch: the tokens of all its texts, each once, in the order of a walk that
follows one text to its end before the next. A token has the position that it has in its text, and sees
only the tokens that lead to it (tree attention: Miao et al. 2024, SpecInfer, arXiv 2305.09781). So
prompts that begin alike share that, a prompt's responses and openings share the prompt, and all is one
forward pass. By `attention`'s blocks a tree is all of a batch: hardly padded, nothing is read twice.
Where each token is looked up in the whole row, rows are short; what all prompts of a batch begin with,
where it is long, is a `reading.Preamble` then.

A model whose layers see more than a mask of attention (recurrent ones, windows shorter than the
texts) reads each text as a row of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from mergekit_align.attention import Blocks, reads_blocks, seen_by_all, to_add
from mergekit_align.reading import MIN_SHARED, body_of, may_share
from mergekit_align.token_ids import TokenIds, common_length, longest

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
LEAST_AT_ONCE = 2048
"""Tokens of a batch that is worth a thread of its own."""
_SIZES = 32
"""From one power of 2 to the next. What oneDNN prepares for a number of tokens PyTorch keeps, for
hundreds of them: one or two milliseconds each, and some megabytes."""


@dataclass(frozen=True)
class Query:
    """A prompt, and the continuations whose probability is asked for."""

    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]
    """Of one token or more each."""

    @cached_property
    def tree(self) -> _Tree:
        """Its own: whatever it is read with, this is worked out once."""
        return _Tree.of(self.prompt, self.continuations)

    @cached_property
    def predictions(self) -> int:
        """Places at which something is predicted."""
        return len(set(self.tree.asked))

    @cached_property
    def longest(self) -> int:
        """Tokens of its longest text."""
        return len(self.prompt) + max(map(len, self.continuations))


class Budget(NamedTuple):
    """What a batch may take."""

    tokens: int
    """Padding included."""
    predictions: int | None = None
    """Places at which the vocabulary's logits are wanted."""
    rows: int | None = None
    """Of trees; of a tree of all, its queries."""

    def shared(self, batches: int) -> Budget:
        """That of each of so many batches."""
        tokens, *others = self
        return Budget(tokens // batches, *(each and max(1, each // batches) for each in others))

    def holds(self, tokens: int, predictions: int, rows: int) -> bool:
        """Whether a batch of so many keeps to it."""
        return (
            tokens <= self.tokens
            and (self.predictions is None or predictions <= self.predictions)
            and (self.rows is None or rows <= self.rows)
        )


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
    blocks: Blocks | None
    """How the one row is read, where it is by `attention`'s blocks."""
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
        seen = pad(seen_by_all(self.ends), (len(self.shared), 0), value=True).unsqueeze(1)
        if model.config.get_text_config()._attn_implementation == "sdpa":
            return seen
        return to_add(seen, model.dtype)


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
        and "position_ids" in inspect.signature(body_of(model).forward).parameters
    )


def plan_batches(
    model: PreTrainedModel,
    queries: Sequence[Query],
    budget: Budget,
    *,
    padded: bool = False,
    at_once: int = 1,
) -> Iterator[TreeBatch]:
    """All queries, each in one batch.

    Args:
        padded: whether a batch may have tokens and predictions that nothing asks for, some hundredths
            of all, so that it has one of few sizes.
        at_once: batches that are read at the same time at most, and have the budget together; of those
            with `blocks` alone.
    """
    if not queries:
        return
    if not reads_trees(model, max(query.longest for query in queries)):
        plain = [_plain(index, query) for index, query in enumerate(queries)]
        yield from _batches(queries, plain, [], budget, model.device, trees=False)
        return
    if reads_blocks(model):
        for tree in _even_trees(queries, budget, at_once):
            yield _tensors(
                queries, [tree], [], model.device, trees=True, blocks=True, padded=padded
            )
        return
    for shared, members in _beginnings(queries):
        known, trees = shared, _trees(queries, members, len(shared))
        if len(trees) == 1:  # it shares that anyhow
            known, trees = [], _trees(queries, members, 0)
        yield from _batches(queries, trees, known, budget, model.device, trees=True)


def _in_order(queries: Sequence[Query]) -> list[int]:
    """Places of queries, in the order of their prompts' token ids."""
    return sorted(range(len(queries)), key=lambda index: list(queries[index].prompt))


def _beginnings(queries: Sequence[Query]) -> list[tuple[list[int], list[int]]]:
    """Groups of queries: what all of its prompts begin with, and their places, in the prompts' order.

    Prompts that share `MIN_SHARED` token ids or more are a group; the rest are one that shares nothing.
    Every prompt goes on after what it shares.
    """
    prompts = [list(query.prompt) for query in queries]
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in _in_order(queries):
        groups.setdefault(tuple(prompts[index][:MIN_SHARED]), []).append(index)
    shared: list[tuple[list[int], list[int]]] = []
    alone: list[int] = []
    for members in groups.values():
        first, last = prompts[members[0]], prompts[members[-1]]
        shortest = min(len(prompts[index]) for index in members)
        same = min(common_length([first, last]), shortest - 1)
        if len(members) > 1 and same >= MIN_SHARED:
            shared.append((first[:same], members))
        else:
            alone += members
    return [*shared, ([], alone)] if alone else shared


class _Tree(NamedTuple):
    """A prompt and its continuations, but for their last tokens."""

    ids: list[int]
    """Those of the first text are the first."""
    depths: list[int]
    """Of each token in its text."""
    ends: list[int]
    """The last place that sees it: all that follow and are deeper do."""
    first: int
    """Tokens of the first text."""
    last: list[int]
    """Places of the last text's tokens."""
    asked: list[int]
    """Places where the continuations' tokens are predicted, of one continuation after another."""

    @classmethod
    def of(cls, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> _Tree:
        texts = sorted({tuple(each[:-1]) for each in continuations})
        ids, path, depths = [*prompt], list(range(len(prompt))), list(range(len(prompt)))
        paths = {}
        for before, text in zip([(), *texts], texts, strict=False):
            known = common_length([before, text])
            path = path[: len(prompt) + known]
            path += range(len(ids), len(ids) + len(text) - known)
            depths += range(len(prompt) + known, len(prompt) + len(text))
            ids += text[known:]
            paths[text] = path
        asked = [paths[tuple(each[:-1])][len(prompt) - 1 :] for each in continuations]
        first = len(prompt) + len(texts[0])
        return cls(ids, depths, _ends(depths), first, path, [*chain(*asked)])


def _ends(depths: Sequence[int]) -> list[int]:
    ends = [len(depths) - 1] * len(depths)
    path: list[int] = []
    for place, depth in enumerate(depths):
        for ended in path[depth:]:
            ends[ended] = place - 1
        path[depth:] = [place]
    return ends


class _Row:
    """Trees in one row; one after another, they share what they begin with.

    Args:
        known: tokens that all of them begin with, and which are left out.
    """

    def __init__(self, known: int) -> None:
        self.ids: list[int] = []
        self.depths: list[int] = []
        self.ends: list[int] = []
        self._known = known
        self._text: list[int] = []
        """The last one, whole."""
        self._path = [-1] * known
        """Places of its tokens."""

    def shares(self, tree: _Tree) -> int:
        """How many tokens a tree's first text begins with that are the last text's too."""
        same = common_length([self._text, tree.ids])
        return max(self._known, min(same, tree.first))

    def add(self, tree: _Tree, same: int) -> list[int]:
        """The places where a tree's tokens are predicted, the first `same` of them the row's own."""
        path = self._path
        # What is new of the tree goes to the row's end.
        further = len(self.ids) - same
        for place, end in zip(path[self._known : same], tree.ends[self._known : same], strict=True):
            if end >= same:
                self.ends[place] = end + further
        self.ids += tree.ids[same:]
        self.depths += tree.depths[same:]
        self.ends += [each + further for each in tree.ends[same:]]
        self._text = [tree.ids[each] for each in tree.last]
        self._path = [path[each] if each < same else each + further for each in tree.last]
        return [path[each] if each < same else each + further for each in tree.asked]


class _Bundle(NamedTuple):
    """Rows that are read together: one of several trees, or the texts of one query."""

    rows: list[_Row]
    queries: list[int]
    asked: list[int]
    """Places, in the rows joined end to end, where the continuations' tokens are predicted."""

    @property
    def width(self) -> int:
        return max(len(row.ids) for row in self.rows)

    @property
    def read(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def predictions(self) -> int:
        return len(set(self.asked))


def _trees(
    queries: Sequence[Query], members: Sequence[int], known: int, budget: Budget | None = None
) -> list[_Bundle]:
    """Rows of the trees of some queries, in their prompts' order, without the first `known` tokens.

    Args:
        budget: of one row; by default it is short.
    """
    bundles: list[_Bundle] = []
    row, predictions = _Row(known), 0
    for index in members:
        query = queries[index]
        size, own = len(query.tree.ids) - known, query.predictions
        same = row.shares(query.tree)
        tokens = len(row.ids) + size - (min(same, len(query.prompt)) - known)
        limits = budget or Budget(max(TREE_TOKENS, size * 3 // 2))
        if not bundles or not limits.holds(tokens, predictions + own, len(bundles[-1].queries) + 1):
            row, same, predictions = _Row(known), known, 0
            bundles.append(_Bundle([row], [], []))
        predictions += own
        bundles[-1].queries.append(index)
        bundles[-1].asked.extend(row.add(query.tree, same))
    return bundles


def _even_trees(queries: Sequence[Query], budget: Budget, at_once: int) -> list[_Bundle]:
    """Rows of all trees, of about as many tokens each, so that `at_once` of them keep to the budget."""
    members = _in_order(queries)
    rows = _trees(queries, members, 0, budget)
    tokens = sum(row.read for row in rows)
    at_once = min(at_once, tokens // LEAST_AT_ONCE)
    if at_once < 2:
        return rows
    count = at_once * -(-tokens // budget.tokens)
    size = -(-tokens // count) + max(query.longest for query in queries)
    own = budget.shared(at_once)
    return _trees(queries, members, 0, own._replace(tokens=min(size, own.tokens)))


def _plain(index: int, query: Query) -> _Bundle:
    """A query's texts, each in a row of its own."""
    asking = {tuple(each[:-1]): each for each in query.continuations}
    bundle = _Bundle([], [index], [])
    places: dict[TokenIds, Sequence[int]] = {}
    for text in longest(asking):
        start = bundle.read
        bundle.rows.append(_Row(0))
        bundle.rows[-1].add(_Tree.of(query.prompt, [asking[text]]), 0)
        for n in range(len(text) + 1):
            places[text[:n]] = range(start + len(query.prompt) - 1, start + len(query.prompt) + n)
    for each in query.continuations:
        bundle.asked.extend(places[tuple(each[:-1])])
    return bundle


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
            self.read + bundle.read,
            self.predictions + bundle.predictions,
        )

    def fits(self, budget: Budget, known: int, device: torch.device) -> bool:
        padded, small = self.rows * self.width, SMALL_BATCH.get(device.type, budget.tokens)
        return (
            budget.holds(padded, self.predictions, self.rows)
            and (padded <= small or padded - self.read <= MOST_PADDING * padded)
            and self.rows * known <= MOST_KNOWN * budget.tokens
        )


def _batches(
    queries: Sequence[Query],
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
            yield _tensors(queries, batch, shared, device, trees=trees)
            batch, grown = [], _Size().grown(bundle)
        batch.append(bundle)
        size = grown
    yield _tensors(queries, batch, shared, device, trees=trees)


def _tensors(
    queries: Sequence[Query],
    bundles: Sequence[_Bundle],
    shared: list[int],
    device: torch.device,
    *,
    trees: bool,
    blocks: bool = False,
    padded: bool = False,
) -> TreeBatch:
    rows = [row for bundle in bundles for row in bundle.rows]
    lengths = np.array([len(row.ids) for row in rows])
    width = int(lengths.max())
    columns = np.arange(_recurring(width) if padded else width)
    read = columns < lengths[:, np.newaxis]
    ids, positions, ends = np.zeros((3, *read.shape), dtype=np.int64)
    positions += len(shared)
    ends += columns
    ids[read] = [*chain.from_iterable(row.ids for row in rows)]
    positions[read] = [*chain.from_iterable(row.depths for row in rows)]
    ends[read] = [*chain.from_iterable(row.ends for row in rows)]

    starts = np.cumsum([0, *(bundle.read for bundle in bundles)])[:-1]
    asked = np.array([*chain.from_iterable(bundle.asked for bundle in bundles)])
    asked += np.repeat(starts, [len(bundle.asked) for bundle in bundles])
    places, asked = np.unique(np.flatnonzero(read)[asked], return_inverse=True)
    if padded:
        places = np.pad(places, (0, _recurring(len(places)) - len(places)), mode="edge")
    members = [index for bundle in bundles for index in bundle.queries]
    continuations = [each for index in members for each in queries[index].continuations]
    owners = np.repeat(np.arange(len(continuations)), [len(each) for each in continuations])
    tokens = np.array([*chain.from_iterable(continuations)])

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return TreeBatch(
        members,
        shared,
        tensor(ids),
        tensor(positions),
        tensor(read.astype(np.int64)),
        tensor(ends) if trees else None,
        Blocks.of(ends[0]) if blocks else None,
        tensor(places),
        tensor(asked),
        tensor(tokens),
        tensor(owners),
    )


def _recurring(size: int) -> int:
    """As large or somewhat larger, of few sizes."""
    step = max(1, (1 << size.bit_length() - 1) // _SIZES)
    return -(-size // step) * step
