"""What this machine is and can do, for figures to be seen against."""

from __future__ import annotations

import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mergekit_align.devices import default_dtype


def name(device: str = "cpu") -> str:
    """The GPU, or the processors: how many, with bfloat16 or not, and threads where they are fewer.

    Of x86 processors the family and the model too: a virtual machine's name may be their maker's alone.
    """
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    found = platform.processor() or platform.machine()
    if _CPUS.exists():
        first, *_ = _CPUS.read_text().split("\n\n")
        lines = (line.partition(":") for line in first.splitlines())
        told = {key.strip(): value.strip() for key, _, value in lines}
        found = told.get("model name", found)
        if "cpu family" in told:
            found += f" (family {told['cpu family']}, model {told['model']})"
    count, threads = os.cpu_count(), torch.get_num_threads()
    half = " with bfloat16" if default_dtype("cpu") == torch.bfloat16 else ""
    fewer = f", threads: {threads}" if threads != count else ""
    return f"{found}, {count} processors{half}{fewer}"


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def clock(device: str) -> float:
    """Seconds: of one CPU thread its processor's, so that other work doesn't count."""
    synchronize(device)
    if device == "cpu" and torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def best_seconds(run: Callable[[], object], device: str) -> float:
    """Of five runs."""

    def seconds() -> float:
        started = clock(device)
        run()
        return clock(device) - started

    return min(seconds() for _ in range(5))


def matmul_rate(
    device: str, dtype: torch.dtype, sizes: tuple[int, int, int] | None = None
) -> float:
    """FLOP a second of a matrix product, large unless [rows, inner, columns] are given."""
    size = 2048 if device == "cpu" else 8192
    rows, inner, columns = sizes or (size, size, size)
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, columns, device=device, dtype=dtype)
    return 2.0 * rows * inner * columns / best_seconds(lambda: a @ b, device)


def copy_rate(device: str, to: str | None = None) -> float:
    """Bytes a second that are read and written where 256 MiB are copied on, or off, a device."""
    source = torch.ones(2**26, device=device)
    target = torch.ones(2**26, device=to or device)
    moved = (1 if to else 2) * 4 * 2**26
    return moved / best_seconds(lambda: target.copy_(source), device)


def new_memory_rate() -> float:
    """Bytes a second that are first written to memory that this process has just been given."""
    size = 2**28
    return size / best_seconds(lambda: torch.empty(size // 4).fill_(1), "cpu")


def new_pages_rate() -> float:
    """Bytes a second that are first written to a new file's pages, as a map of it."""
    size, source = 2**28, torch.ones(2**26)
    best = 0.0
    for _ in range(3):
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(size)
            pages = torch.from_numpy(np.memmap(file.name, np.float32, "r+"))
            started = clock("cpu")
            pages.copy_(source)
            best = max(best, size / (clock("cpu") - started))
    return best


def memory() -> int:
    """Bytes that this process holds."""
    return _status("VmRSS") if _PROC.exists() else peak_memory()


def peak_memory() -> int:
    """Bytes that this process held at most, so far.

    On Linux not by `getrusage`, whose figure of a spawned process starts at its parent's.
    """
    if _PROC.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Let `peak_memory` begin anew, on Linux."""
    if _PROC.exists():
        Path("/proc/self/clear_refs").write_text("5")


_PROC = Path("/proc/self/status")
_CPUS = Path("/proc/cpuinfo")


def _status(key: str) -> int:
    (line,) = (line for line in _PROC.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024
