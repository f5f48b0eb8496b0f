"""One click command a file: it parses, calls and prints; what a command does lives elsewhere."""

import ctypes
import os

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h


def _keep_memory() -> None:
    """Have glibc keep what is freed: up to 512 MiB, and pieces of up to 32 MiB, the most that it takes.

    What it gives back, Linux clears when it is wanted again: a quarter of a candidate's time in a
    search of small models on a CPU.
    """
    if not {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & {*os.environ}:
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_MMAP_THRESHOLD, 32 << 20)
            set_option(_TRIM_THRESHOLD, 512 << 20)


# torch, when it first allocates, looks whether to ask Linux for huge pages. With them new memory costs
# a fifth of the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if os.name == "posix":
    _keep_memory()
