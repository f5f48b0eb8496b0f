"""A model's batches on a CPU, read by several threads at once, each with cores of its own.

PyTorch gives every operation to all cores: they wait for the slowest at each, and what one wrote
another reads next. On a busy virtual machine two took nearly as long as one, for minutes on end. A
batch that is read from beginning to end by the same cores waits once, and stays in their caches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from queue import SimpleQueue
from threading import Barrier
from typing import TYPE_CHECKING, TypeVar

import torch

from mergekit_align.attention import reads_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")

MOST_READERS = 4
"""Of one model at once: what they do in Python they do one after another."""


def readers_of(model: PreTrainedModel) -> int:
    """How many threads may read a model at once; one where its copies might not be as it is."""
    threads = torch.get_num_threads()
    if threads == 1 or not reads_blocks(model) or any(map(_is_changed, model.modules())):
        return 1
    return min(MOST_READERS, threads)


def _is_changed(module: torch.nn.Module) -> bool:
    """Whether more is done when it is called than its class says."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def one_thread() -> Iterator[None]:
    """Have PyTorch's operations take one thread: the others would look out for more work for a while,
    at the cost of what is read next.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Readers:
    """Threads that read a model, each in a copy that has the model's own parameters.

    What is merged into the model is in its copies too.

    Args:
        count: of threads, as many as `readers_of` the model at most.
    """

    def __init__(self, model: PreTrainedModel, count: int) -> None:
        self._free: SimpleQueue[PreTrainedModel] = SimpleQueue()
        for _ in range(count):
            shared = {id(each): each for each in chain(model.parameters(), model.buffers())}
            self._free.put(copy.deepcopy(model, shared))
        threads = torch.get_num_threads()
        started = Barrier(count)

        def start() -> None:
            torch.get_num_threads()  # which else would set it when PyTorch first asks
            torch.set_num_threads(max(1, threads // count))
            started.wait()

        self._pool = ThreadPoolExecutor(count, "reader", initializer=start)
        for _ in self._pool.map(int, range(count)):
            pass
        torch.set_num_threads(threads)  # for threads that others start

    def map(
        self, read: Callable[[PreTrainedModel, _Item], _Found], items: Iterable[_Item]
    ) -> Iterator[_Found]:
        """What `read` finds, in the order of `items`."""

        def take(item: _Item) -> _Found:
            model = self._free.get()
            try:
                return read(model, item)
            finally:
                self._free.put(model)

        return self._pool.map(take, items)
