"""Which device and floating type to compute with where the user does not say; and memory given back."""

from __future__ import annotations

import ctypes
import gc
import os

import torch

from mergekit_align.errors import InputError


def default_device() -> str:
    """`cuda` where a GPU is usable, else `cpu`."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return "cuda" if not hidden and torch.cuda.is_available() else "cpu"


def check_device(device: str, where: str) -> None:
    """That there is such a device.

    Args:
        device: as torch names it.
        where: what names it, as an error begins: a file and its key, or an option.

    Raises:
        InputError: there is none.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an assertion where torch has no CUDA
        raise InputError(
            f"{where}: found {device!r}; expected cpu or a GPU that is there"
        ) from error


def use_cpu_only() -> None:
    """Hide the GPUs from what this process decides and starts from here on, Ray's workers included."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def default_dtype(device: str) -> torch.dtype:
    """bfloat16, except on a CPU without bfloat16 arithmetic, where float32 is faster."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    # torch has no public way to ask; a version without these tests counts as no.
    tests = (
        getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")
    )
    return any(test is not None and test() for test in tests)


def give_memory_back() -> None:
    """What is in use no more, to the system: C's allocator keeps much of it otherwise."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # glibc's
        trim(0)
