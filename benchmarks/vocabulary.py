"""Peak memory of losses and gradients where the vocabulary is large: ours, and all logits at once.

    python benchmarks/vocabulary.py --layers 2 --json vocabulary.json       # Gemma 3 270M's shape
    python benchmarks/vocabulary.py --shape gemma3-vocabulary               # its vocabulary alone
    python benchmarks/vocabulary.py --shape qwen3-0.6b --response 2048

One sample, its prompt 64 tokens long, and random weights of a published model's shape, with all of
its layers or the first `--layers`. *All at once* holds the logits of every response token, their
log-softmax and, for the gradient, theirs. Each side has a process of its own, whose memory with the
model is subtracted from its peak; so the gradient's peak has the parameters' gradients in it on both
sides.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import torch
from machine import memory, name, peak_memory
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from mergekit_align.encoding import EncodedSample
from mergekit_align.gradient import mean_loss
from mergekit_align.loss import response_scores

SHAPES: dict[str, dict[str, Any]] = {
    "gemma3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
# A small model, so that little but the logits takes memory.
SHAPES["gemma3-vocabulary"] = {
    **SHAPES["gemma3-270m"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 32,
}
PROMPT = 64


def config_of(shape: str, layers: int | None) -> PretrainedConfig:
    """Of a published model, cut to its first layers."""
    values = {**SHAPES[shape]}
    if layers:
        values["num_hidden_layers"] = min(layers, values["num_hidden_layers"])
    return AutoConfig.for_model(**values)


def plain_loss(model: Any, sample: EncodedSample) -> torch.Tensor:
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    count = len(sample.response_ids)
    logits = model(input_ids=ids, logits_to_keep=count + 1).logits[:, :-1].float()
    chosen = logits.log_softmax(2).gather(2, ids[:, -count:].unsqueeze(2))
    loss: torch.Tensor = -chosen.mean()
    return loss


def measure(
    side: str, what: str, shape: str, layers: int | None, response: int
) -> dict[str, float]:
    """Seconds, bytes beyond the model's, and the loss, of one side in this process."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(shape, layers), dtype=torch.float32).eval()
    rng, vocabulary = random.Random(0), model.config.vocab_size
    sample = EncodedSample(
        *(rng.choices(range(vocabulary), k=count) for count in (PROMPT, response))
    )
    held, started, used = memory(), time.perf_counter(), time.process_time()
    if what == "gradient":
        if side == "ours":
            loss = mean_loss(model, [sample]).accumulate()
        else:
            value = plain_loss(model, sample)
            value.backward()  # type: ignore[no-untyped-call]
            loss = float(value.detach())
    elif side == "ours":
        loss = response_scores(model, [sample])[0].loss
    else:
        with torch.inference_mode():
            loss = float(plain_loss(model, sample))
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - used,
        "bytes": peak_memory() - held,
        "loss": loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="gemma3-270m")
    parser.add_argument("--layers", type=int, help="the first of the model's; by default all")
    parser.add_argument("--response", type=int, default=1024, help="tokens of the response")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    shape, layers, response = arguments.shape, arguments.layers, arguments.response
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, dict[str, float]]] = {}
    table = Table("", "way", "peak MiB beyond the model", "seconds", "of processor")
    for what in ("loss", "gradient"):
        found[what] = {}
        for side in ("all at once", "ours"):
            with context.Pool(1) as pool:
                each = pool.apply(measure, (side, what, shape, layers, response))
            found[what][side] = each
            table.add_row(
                what,
                side,
                f"{each['bytes'] / 2**20:.0f}",
                f"{each['seconds']:.1f}",
                f"{each['processor_seconds']:.1f}",
            )
    config = config_of(shape, layers)
    difference = max(
        abs(sides["ours"]["loss"] - sides["all at once"]["loss"]) for sides in found.values()
    )
    console = Console()
    console.print(
        f"{shape}, {config.num_hidden_layers} layers, {config.vocab_size} in the vocabulary, "
        f"{response} response tokens, float32, cpu ({name()})"
    )
    console.print(table)
    console.print(f"Losses differ by {difference:.1e} at most.")
    if arguments.json:
        record = {
            "kind": "vocabulary",
            "machine": name(),
            "shape": shape,
            "layers": config.num_hidden_layers,
            "vocabulary": config.vocab_size,
            "response_tokens": response,
            "dtype": "float32",
            "sides": found,
            "largest_difference": difference,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
