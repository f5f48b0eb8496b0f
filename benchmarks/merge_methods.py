"""Our merge methods' kernels on one layer of an 8B model, beside stock task arithmetic and TIES.

    python benchmarks/merge_methods.py                    # 4096 x 4096 and 4096 x 14336, bfloat16
    python benchmarks/merge_methods.py --device cuda --json merge_methods.json

Two models and a base (three for SafeMERGE). On a CPU each method runs in a process of its own, on the
same random tensors; seconds are the best of three, bytes the peak beyond the inputs. Statistics come
from files (in the page cache), which the methods' seconds include and "without reading" leaves out, for
task arithmetic's inputs are in memory already. The whole model's seconds are extrapolated:
Llama 3 8B has 32 layers of two 4096 x 4096 matrices, two 1024 x 4096, and three 14336 x 4096; an
element-wise method's time goes with the entries, another's is taken from the two shapes measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import memory, name, peak_memory, synchronize
from mergekit.merge_methods import PerInputValues, get
from mergekit.merge_methods.base import TensorGroup
from rich.console import Console
from rich.table import Column, Table

from mergekit_align.merge_methods.statistics import read_statistics
from mergekit_align.statistics.files import Accumulators, Header, Kind

SHAPES = ((4096, 4096), (14336, 4096))
ELEMENTWISE = ("task_arithmetic", "resta", "fisher")
OTHERS = ("ties", "led", "safe_lora", "safemerge", "lox", "lssf", "regmean", "align_adaptive")
KINDS: dict[str, Kind] = {
    "fisher": "fisher",
    "led": "importance",
    "regmean": "gram",
    "align_adaptive": "gram",
}
REPEATS = 3
LONG = 10.0
TWICE = 2.0


def statistics_file(directory: Path, kind: Kind, shape: tuple[int, int], seed: int) -> str:
    """Statistics of a tensor "w", as a model with random inputs would have them."""
    file = Accumulators(directory, Header("", "", "", [], None, 0, "task", kind, {}), {"w": shape})
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    file.tensors["w"].copy_(rows @ rows.T / shape[0] if kind == "gram" else rows.square())
    file.finish()
    return str(directory)


def prepare(work: Path, shape: tuple[int, int]) -> dict[str, list[str]]:
    """Statistics by kind: for each of two models, and for the base on their samples."""
    found: dict[str, list[str]] = {}
    for kind in dict.fromkeys(KINDS.values()):
        own = (shape[1], shape[1]) if kind == "gram" else shape
        found[kind] = [
            statistics_file(work / f"{shape[0]}-{kind}-{n}", kind, own, n)
            for n in range(4 if kind == "importance" else 2)
        ]
    return found


def run(
    method: str, shape: tuple[int, int], dtype: str, device: str, places: dict[str, list[str]]
) -> dict[str, float]:
    """Seconds and bytes of one kernel."""
    roles = ["base", "aligned", "expert", *(["safe"] if method == "safemerge" else [])]
    if method in ("fisher", "regmean"):
        roles.remove("base")
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(shape, generator=generator)
    tensors = [
        (first + 0.01 * torch.randn(shape, generator=generator)).to(device, getattr(torch, dtype))
        for _ in roles
    ]
    del first
    group = TensorGroup.from_tensors(
        tensors, ids=roles, base_index=0 if roles[0] == "base" else None, name="w"
    )
    own = [role for role in roles if role != "base"]
    parameters: dict[str, Any] = {"weight": PerInputValues([(each, 1.0) for each in own])}
    known = {parameter.name for parameter in get(method).spec.parameters}
    if method == "ties":
        parameters["density"] = PerInputValues([(each, 0.5) for each in own])
    if "role" in known:
        parameters["role"] = PerInputValues([(each, each) for each in own])
    for n, key in enumerate(("statistics", "base_statistics")):
        if key in known:
            files = places[KINDS[method]][2 * n : 2 * n + 2]
            parameters[key] = PerInputValues(list(zip(own, files, strict=True)))
    held = memory()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    seconds = best(lambda: get(method)([group], parameters=parameters), device)
    peak = peak_memory() if device == "cpu" else torch.cuda.max_memory_allocated()
    given = [
        dict(parameters[key]) for key in ("statistics", "base_statistics") if key in parameters
    ]

    def read() -> None:
        for own in given:
            for directory in own.values():
                read_statistics(directory, KINDS[method], group)

    return {"seconds": seconds, "reading": best(read, device), "bytes": peak - held}


def best(run: Callable[[], object], device: str) -> float:
    """Seconds: the least of three times, or of one that takes long."""
    least, began = float("inf"), time.perf_counter()
    for _ in range(REPEATS):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        least = min(least, time.perf_counter() - started)
        if time.perf_counter() - began > LONG:
            break
    return least


def whole_model(method: str, square: float, tall: float) -> float:
    """Seconds of Llama 3 8B's layers, from those of the two shapes."""
    if method in ELEMENTWISE:
        entries = 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096
        return 32 * tall * entries / (14336 * 4096)
    return 32 * (2.5 * square + 3 * tall)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument(
        "--method", action="append", choices=(*ELEMENTWISE, *OTHERS), help="may be repeated"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    console, context = Console(), multiprocessing.get_context("spawn")
    methods = dict.fromkeys(["task_arithmetic", *(arguments.method or (*ELEMENTWISE, *OTHERS))])
    found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    with tempfile.TemporaryDirectory() as work:
        for shape in SHAPES:
            places = prepare(Path(work), shape)
            for method in found:
                order = (method, shape, arguments.dtype, arguments.device, places)
                if arguments.device != "cpu":
                    found[method].append(run(*order))  # its peak can be reset
                else:
                    with context.Pool(1) as pool:
                        found[method].append(pool.apply(run, order))
                console.print(f"{method}, {shape}: {found[method][-1]}")
    title = [f"{rows} x {columns}" for rows, columns in SHAPES]
    table = Table(
        Column("method", no_wrap=True),
        *(f"{t}, s" for t in title),
        "of these reading",
        *(f"{t}, MiB" for t in title),
        "x task arithmetic",
        "without reading",
        "8B, s (extrapolated)",
    )
    stock = [each["seconds"] for each in found["task_arithmetic"]]
    ratios, bare = (
        {
            method: max(
                (e["seconds"] - part * e["reading"]) / s for e, s in zip(own, stock, strict=True)
            )
            for method, own in found.items()
        }
        for part in (0, 1)
    )
    for method, own in found.items():
        table.add_row(
            method,
            *(f"{each['seconds']:.3f}" for each in own),
            ", ".join(f"{each['reading']:.3f}" for each in own),
            *(f"{each['bytes'] / 2**20:.0f}" for each in own),
            f"{ratios[method]:.2f}",
            f"{bare[method]:.2f}",
            f"{whole_model(method, *(each['seconds'] for each in own)):.0f}",
        )
    console.print(f"{name(arguments.device)}, {arguments.dtype}")
    console.print(table)
    for method in ELEMENTWISE:
        if bare.get(method, 0.0) > TWICE:
            console.print(f"{method} takes {bare[method]:.2f} x task arithmetic, not {TWICE:g}.")
    if arguments.json:
        record = {
            "machine": name(arguments.device),
            "dtype": arguments.dtype,
            "shapes": SHAPES,
            "methods": found,
            "times_task_arithmetic": ratios,
            "times_without_reading": bare,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
