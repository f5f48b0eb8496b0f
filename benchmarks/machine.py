"""What this machine is and can do, for figures to be seen against."""

from __future__ import annotations

import platform
import resource
import time
from pathlib import Path

import torch


def name(device: str = "cpu") -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP a second of a large matrix product."""
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        a @ a
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
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


_PROC = Path("/proc/self/status")


def _status(key: str) -> int:
    (line,) = (line for line in _PROC.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024
