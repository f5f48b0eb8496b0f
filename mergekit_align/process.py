"""How a process of one of our commands imports, keeps memory and collects garbage.

What these settings are worth is a matter of a program, not of a library: importing `mergekit_align`
changes nothing.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_SELDOM_USED = "datasets", "peft", "requests"
"""What lm-eval and mergekit import, for data from a hub and LoRA adapters: a second in all."""
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h


def set_up() -> None:
    """To be called once, before anything else is imported."""
    # torch, when it first allocates, looks whether to ask Linux for huge pages. With them new memory
    # costs a fifth of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_memory()
    # Of the objects that libraries make when they are used first, nearly all stay too.
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


class _Deferred(ModuleType):
    """Stands for a package, which is imported when something of it is used.

    `importlib.util.LazyLoader`'s is as soon as anyone looks where its file is; torch looks at all.
    """

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__file__ = spec, spec.origin

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def importing() -> Iterator[None]:
    """What is imported here imports no package that is seldom used, until it uses it.

    Nor is garbage looked for among what is made here, now or later. Importing torch and transformers
    makes a million objects that stay; to look through them takes a quarter of the time that the
    imports take, and as long again at the end.
    """
    absent = [name for name in _SELDOM_USED if name not in sys.modules]
    deferred = {name: _Deferred(spec) for name in absent if (spec := find_spec(name))}
    sys.modules.update(deferred)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        for name, module in deferred.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def keep_memory() -> None:
    """Have glibc keep what is freed: up to 512 MiB, and pieces of up to 32 MiB, the most that it takes.

    What it gives back, Linux clears when it is wanted again: a quarter of a candidate's time in a
    search of small models on a CPU.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & {*os.environ}:
        return  # they are the user's
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, 32 << 20)
        set_option(_TRIM_THRESHOLD, 512 << 20)
