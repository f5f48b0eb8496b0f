"""Whole models through every merge method: `mergekit-yaml`, from checkpoints to a checkpoint.

    python benchmarks/merge_model.py                                       # SmolLM2-135M's shape, CPU
    python benchmarks/merge_model.py --model Llama-3.2-1B --device cuda --json merge_model.json

A base and two models near it, with random weights in bfloat16, on disk; what methods need is taken by
`mergekit-align-stats` first. Seconds are a command's, its start (imports: the same for all) included.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import name
from merge_methods import KINDS
from rich.console import Console
from rich.table import Table
from role_config import parameters_of, role_config
from scale import SIZES
from transformers import AutoModelForCausalLM

from mergekit_align.demo.grammar import refusal, unsafe_prompts
from mergekit_align.demo.tokenizer import build_tokenizer
from mergekit_align.samples import Sample, SampleType, save_samples

METHODS = (
    "task_arithmetic",
    "linear",
    "ties",
    "resta",
    "fisher",
    "led",
    "safe_lora",
    "safemerge",
    "lox",
    "lssf",
    "regmean",
    "align_adaptive",
)
PARENTS: dict[str, SampleType] = {"aligned": "alignment", "expert": "task"}


def command(*words: str) -> float:
    """Seconds of one of the commands beside this interpreter."""
    started = time.perf_counter()
    place = str(Path(sys.executable).with_name(words[0]))
    done = subprocess.run([place, *words[1:]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return time.perf_counter() - started


def make_models(work: Path, size: str, device: str) -> int:
    """`base`, `aligned` and `expert`; the number of parameters."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SIZES[size].config(), dtype=torch.bfloat16)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for role in ("base", *PARENTS):
        for key, tensor in model.state_dict().items():
            if role != "base":
                tensor.copy_(base[key] + 0.002 * torch.randn_like(tensor))
        model.save_pretrained(work / role)
        tokenizer.save_pretrained(work / role)
    return int(model.num_parameters())


def make_samples(path: Path, count: int) -> None:
    """Of each parent's type."""
    rng, prompts = random.Random(0), unsafe_prompts()
    drawn = rng.sample(prompts, 2 * count)
    samples = [
        Sample(prompt=prompt.text, response=refusal(prompt, rng), type=kind)
        for prompt, kind in zip(drawn, [*PARENTS.values()] * count, strict=True)
    ]
    save_samples(samples, path)


def config(method: str, work: Path) -> dict[str, Any]:
    known = parameters_of(method)
    shares: dict[str, Any] = {key: 0.5 for key in ("weight", "density") if key in known}
    return role_config(method, work, PARENTS, shares, base=f"{work}/base", dtype="bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="SmolLM2-135M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=4, help="of each model's type")
    parser.add_argument("--method", action="append", choices=METHODS, help="may be repeated")
    parser.add_argument("--work", help="the models are made here  [default: the system's]")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    console, device = Console(), arguments.device
    seconds: dict[str, float] = {}
    statistics: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        work = Path(directory)
        parameters = make_models(work, arguments.model, device)
        make_samples(work / "samples.jsonl", arguments.samples)
        methods = arguments.method or METHODS
        wanted = {KINDS[method] for method in methods if method in KINDS}
        for model, role in (*((role, role) for role in PARENTS), *(("base", r) for r in PARENTS)):
            kinds = wanted if model == role else wanted & {"importance"}
            if not kinds:
                continue
            out = role if model == role else f"base-{role}"
            statistics[out] = command(
                "mergekit-align-stats",
                str(work / model),
                *("--data", str(work / "samples.jsonl"), "--type", PARENTS[role]),
                *(word for kind in sorted(kinds) for word in ("--kind", kind)),
                *("--out", str(work / "statistics" / out), "--device", device),
            )
            console.print(f"statistics {out}: {statistics[out]:.1f} s")
        for method in methods:
            file = work / f"{method}.yml"
            file.write_text(yaml.safe_dump(config(method, work)), encoding="utf-8")
            options = ["--cuda"] if device != "cpu" else []
            merged = str(work / "merged")
            seconds[method] = command("mergekit-yaml", str(file), merged, "--quiet", *options)
            shutil.rmtree(merged)
            console.print(f"{method}: {seconds[method]:.1f} s")
    table = Table("method", "seconds", "x the first")
    first = next(iter(seconds.values()))
    for method, own in seconds.items():
        table.add_row(method, f"{own:.1f}", f"{own / first:.2f}")
    console.print(f"{arguments.model}, {parameters / 1e9:.2f}B parameters, {name(device)}")
    console.print(table)
    if arguments.json:
        record = {
            "machine": name(device),
            "model": arguments.model,
            "parameters": parameters,
            "samples": arguments.samples,
            "statistics": statistics,
            "seconds": seconds,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
