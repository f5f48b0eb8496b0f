"""Losses of a cocktail's models: ours, against LM-Cocktail's way of computing them.

    python benchmarks/cocktail.py                          # random weights of SmolLM2-135M's shape
    python benchmarks/cocktail.py MODEL MODEL MODEL --data samples.jsonl --json cocktail.json

LM-Cocktail's way (arXiv 2311.13534) is rebuilt here from its description: every model's weights are
loaded and held, each is copied in turn into one model, and examples are read two at a time, all
padded to 2048 tokens, with logits at every position. Both sides read the same samples by the same
models in the same floating type, each in a process of its own, whose memory after its imports is
subtracted from its peak. The floor is the arithmetic of the unpadded tokens (the output layer only
where a response token is predicted) at the rate that this machine multiplies matrices.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import matmul_rate, memory, name, peak_memory
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mergekit_align.cocktail.losses import Models, Precision, encode, sample_losses
from mergekit_align.demo.grammar import refusal, unsafe_prompts
from mergekit_align.demo.tokenizer import build_tokenizer
from mergekit_align.samples import Sample, load_samples

PADDED = 2048
BATCH = 2
MOST = 6


def random_model(directory: Path, seed: int) -> str:
    """A model of SmolLM2-135M's shape with the demo's tokenizer."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=PADDED,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def random_samples(count: int) -> list[Sample]:
    """As many of each type: short prompts that are refused, prompts of up to 400 tokens answered."""
    rng = random.Random(0)
    prompts = unsafe_prompts()

    def text(words: int) -> str:
        return " ".join(refusal(rng.choice(prompts), rng) for _ in range(1 + words // 12))

    refused = [
        Sample(prompt=rng.choice(prompts).text, response=text(20), type="alignment")
        for _ in range(count)
    ]
    answered = [
        Sample(prompt=text(rng.randint(20, 300)), response=text(8), type="task")
        for _ in range(count)
    ]
    return [*refused, *answered]


def theirs(models: list[str], samples: list[Sample], dtype: str) -> list[list[float]]:
    """Mean loss of each sample under each model, all of them in memory."""

    def load(path: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))

    weights = [load(path).state_dict() for path in models]
    model, found = load(models[0]).eval(), []
    for path, state in zip(models, weights, strict=True):
        model.load_state_dict(state)
        tokenizer = AutoTokenizer.from_pretrained(path)
        encoded = encode(samples, tokenizer, ModelReference.parse(path), _models(dtype))
        losses: list[float] = []
        for start in range(0, len(encoded), BATCH):
            batch = encoded[start : start + BATCH]
            ids = torch.zeros(len(batch), PADDED, dtype=torch.long)
            labels = torch.full_like(ids, -100)
            mask = torch.zeros_like(ids)
            for row, each in enumerate(batch):
                prompt, end = len(each.prompt_ids), len(each.prompt_ids) + len(each.response_ids)
                ids[row, :end] = torch.tensor([*each.prompt_ids, *each.response_ids])
                labels[row, prompt:end] = ids[row, prompt:end]
                mask[row, :end] = 1
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            losses += [
                float(torch.nn.functional.cross_entropy(row.float(), wanted))
                for row, wanted in zip(logits, labels[:, 1:], strict=True)
            ]
        found.append(losses)
    return found


def ours(models: list[str], samples: list[Sample], dtype: str) -> list[list[float]]:
    references = [ModelReference.parse(path) for path in models]
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in models]
    with tempfile.TemporaryDirectory() as cache:
        losses = sample_losses(references, tokenizers, samples, _models(dtype), cache=cache)
    return [[loss.nll / loss.tokens for loss in own] for own in losses]


def _models(dtype: str) -> Models:
    return Models(Precision("cpu", dtype), MergeOptions())


def measured(
    way: Callable[..., list[list[float]]], models: list[str], samples: list[Sample], dtype: str
) -> dict[str, Any]:
    """Seconds, peak bytes beyond the imports', and losses of one side, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (way.__name__, models, samples, dtype))


def _measure(way: str, models: list[str], samples: list[Sample], dtype: str) -> dict[str, Any]:
    before, started = memory(), time.perf_counter()
    losses = {"ours": ours, "theirs": theirs}[way](models, samples, dtype)
    return {
        "seconds": time.perf_counter() - started,
        "bytes": peak_memory() - before,
        "bytes_with_imports": peak_memory(),
        "losses": losses,
    }


def floor_flops(model: str, samples: list[Sample]) -> float:
    """Arithmetic of one model's pass over the unpadded samples."""
    config = AutoModelForCausalLM.from_pretrained(model).config
    encoded = encode(
        samples,
        AutoTokenizer.from_pretrained(model),
        ModelReference.parse(model),
        _models("float32"),
    )
    hidden, layers, ffn = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    head = (
        config.head_dim
        if getattr(config, "head_dim", None)
        else hidden // config.num_attention_heads
    )
    attention = 2 * hidden * head * (config.num_attention_heads + config.num_key_value_heads)
    body = layers * (attention + 3 * hidden * ffn)
    tokens = sum(len(each.prompt_ids) + len(each.response_ids) for each in encoded)
    predicted = sum(len(each.response_ids) for each in encoded)
    return float(2 * (body * tokens + hidden * config.vocab_size * predicted))


def renamed(models: list[str], count: int, directory: Path) -> list[str]:
    """`count` models, each to be taken for another one."""
    found = []
    for number in range(count):
        copy = directory / f"model-{number}"
        copy.mkdir()
        for file in Path(models[number % len(models)]).resolve().iterdir():
            if file.is_file():
                (copy / file.name).symlink_to(file)
        (copy / "number.txt").write_text(str(number))
        found.append(str(copy))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="three or more model directories")
    parser.add_argument("--data", help="samples; by default made up")
    parser.add_argument("--samples", type=int, default=5, help="of each type")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    samples = random_samples(arguments.samples)
    if arguments.data:
        every, samples = load_samples(arguments.data), []
        for kind in dict.fromkeys(sample.type for sample in every):
            samples += [s for s in every if s.type == kind][: arguments.samples]
    console, dtype = Console(), arguments.dtype
    with tempfile.TemporaryDirectory() as work:
        models = arguments.models or [random_model(Path(work) / f"m{n}", n) for n in range(3)]
        results = {
            "theirs, three models": measured(theirs, models[:3], samples, dtype),
            "ours, three models": measured(ours, models[:3], samples, dtype),
        }
        copies = renamed(models, MOST, Path(work))
        for count in (2, 4, MOST):
            results[f"ours, {count} models"] = measured(ours, copies[:count], samples, dtype)
        floor = 3 * floor_flops(models[0], samples) / matmul_rate("cpu", getattr(torch, dtype))
    first, second = results["theirs, three models"], results["ours, three models"]
    difference = max(
        abs(a - b)
        for left, right in zip(first["losses"], second["losses"], strict=True)
        for a, b in zip(left, right, strict=True)
    )
    faster = first["seconds"] / second["seconds"]
    share = second["bytes"] / first["bytes"]
    table = Table("way", "seconds", "peak MiB beyond imports", "with imports")
    for way, each in results.items():
        mib = [f"{each[key] / 2**20:.0f}" for key in ("bytes", "bytes_with_imports")]
        table.add_row(way, f"{each['seconds']:.2f}", *mib)
    console.print(f"{len(samples)} samples, {dtype}, cpu ({name()})")
    console.print(table)
    console.print(
        f"Ours is {faster:.1f} x as fast in {share:.2f} of the memory; losses differ by "
        f"{difference:.1e} at most. The floor is {floor:.2f} s: ours takes "
        f"{second['seconds'] / floor:.1f} x that, loading included."
    )
    if arguments.json:
        record = {
            "machine": name(),
            "dtype": dtype,
            "samples": len(samples),
            "ways": {
                way: {key: each[key] for key in each if key != "losses"}
                for way, each in results.items()
            },
            "times_faster": faster,
            "share_of_memory": share,
            "largest_difference": difference,
            "floor_seconds": floor,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
