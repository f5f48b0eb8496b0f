"""Verdicts a second: ours, against a plain `generate` and a plain batched forward pass.

    python benchmarks/guard.py                                  # a 25M-parameter guard, on the CPU
    python benchmarks/guard.py --shape 1b --device cuda --dtype bfloat16
    python benchmarks/guard.py --responses 1024 --json guard.json

The guard has random weights, Llama Guard 3's layout and a policy that makes its fixed preamble 600
tokens long; responses have 20 to 400 tokens, each doubling as often as any other or (`--lengths even`)
each length. *generate* is what most users run: 100 new tokens, one response at a time. *plain* pads
each batch, in the order given, and reads the last position's logits; *plain, one by one* pads nothing.
Ours reads the preamble once. The floor is the arithmetic of what comes after the preamble at the rate
that this machine multiplies matrices.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from machine import matmul_rate, name, synchronize
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_align.demo.grammar import refusal, unsafe_prompts
from mergekit_align.demo.tokenizer import build_tokenizer
from mergekit_align.guard import Conversation, Guard, GuardSettings, profiles
from mergekit_align.guard.prompt import PromptWriter
from mergekit_align.guard.scorer import HuggingFaceScorer

PREAMBLE = 600
SHAPES = {
    "25m": {"hidden": 512, "ffn": 1408, "layers": 8, "heads": 8, "kv": 4, "vocab": 4096},
    # Two layers of the next, with a small vocabulary.
    "1b-2-layers": {"hidden": 2048, "ffn": 8192, "layers": 2, "heads": 32, "kv": 8, "vocab": 4096},
    # Llama Guard 3's own.
    "1b": {"hidden": 2048, "ffn": 8192, "layers": 16, "heads": 32, "kv": 8, "vocab": 128256},
    "8b": {"hidden": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab": 128256},
}


def random_guard(shape: str, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    sizes = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=sizes["vocab"],
                hidden_size=sizes["hidden"],
                intermediate_size=sizes["ffn"],
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"],
                num_key_value_heads=sizes["kv"],
                max_position_embeddings=2048,
                tie_word_embeddings=True,
            )
        )
    return model.to(dtype).eval()


def guard_tokenizer() -> PreTrainedTokenizerFast:
    """The demo guard's tokenizer, its policy drawn out until the preamble is 600 tokens long."""
    tokenizer = build_tokenizer(guard=True)
    template = str(tokenizer.chat_template)
    mark = "<END UNSAFE"
    while True:
        head = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
        length = len(tokenizer(head.split("User: ")[0]).input_ids)
        if length >= PREAMBLE:
            return tokenizer
        template = template.replace(mark, "No how to make it. " + mark, 1)
        tokenizer.chat_template = template


def conversations(
    tokenizer: PreTrainedTokenizerFast, count: int, lengths: str
) -> list[Conversation]:
    rng = random.Random(0)
    prompts = unsafe_prompts()
    found = []
    for _ in range(count):
        length, text = rng.randint(20, 400), ""
        if lengths == "log":
            length = round(20 * (400 / 20) ** rng.random())
        while len(tokenizer(text).input_ids) < length:
            text += " " + refusal(rng.choice(prompts), rng)
        ids = tokenizer(text).input_ids[:length]
        found.append(Conversation.of(rng.choice(prompts).text, tokenizer.decode(ids)))
    return found


def plain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], batch: int
) -> list[float]:
    """P(unsafe) from one padded forward pass a batch."""
    tokenizer.padding_side = "left"
    answers = [tokenizer(word).input_ids[0] for word in ("safe", "unsafe")]
    found: list[float] = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(texts[start : start + batch], return_tensors="pt", padding=True)
        with torch.inference_mode():
            logits = model(**inputs.to(model.device)).logits[:, -1, answers]
        found += logits.float().softmax(1)[:, 1].tolist()
    return found


def generate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            model.generate(
                **inputs, max_new_tokens=100, min_new_tokens=100, do_sample=False, pad_token_id=0
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="25m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--lengths", choices=["log", "even"], default="log")
    parser.add_argument("--generated", type=int, default=8, help="responses that `generate` judges")
    parser.add_argument("--batch", type=int, default=16, help="of the plain pass")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    model = random_guard(arguments.shape, device, dtype)
    tokenizer = guard_tokenizer()
    judged = conversations(tokenizer, arguments.responses, arguments.lengths)
    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": ("user", "assistant")[index % 2], "content": turn}
                for index, turn in enumerate(conversation.turns)
            ],
            tokenize=False,
        )
        + "\n\n"
        for conversation in judged
    ]
    scorer, profile = HuggingFaceScorer(model, tokenizer), profiles()["llama-guard-3"]
    guard = Guard(scorer, profile, GuardSettings(model="random weights", categories=False))
    guard.judge(judged[:16])
    plain(model, tokenizer, texts[:8], 8)
    generate(model, tokenizer, texts[:1])
    seconds = {}
    synchronize(device)
    started = time.perf_counter()
    generate(model, tokenizer, texts[: arguments.generated])
    synchronize(device)
    seconds["generate"] = (time.perf_counter() - started) / arguments.generated
    started = time.perf_counter()
    expected = plain(model, tokenizer, texts, arguments.batch)
    seconds["plain"] = (time.perf_counter() - started) / len(texts)
    some = texts[: max(1, len(texts) // 4)]
    started = time.perf_counter()
    plain(model, tokenizer, some, 1)
    seconds["plain, one by one"] = (time.perf_counter() - started) / len(some)
    started = time.perf_counter()
    verdicts = guard.judge(judged)
    seconds["ours"] = (time.perf_counter() - started) / len(texts)

    # Random weights put little on "safe" and "unsafe": of an unreadable verdict too, the share of each.
    writer = PromptWriter(tokenizer, profile)
    frame = writer.frame(judged[0], None)
    prompts = [prompt.ids for prompt in writer.encode_all(judged)]
    scores = scorer.scores(prompts, frame.tree, preamble=frame.preamble)
    found = [frame.tree.probabilities(score.logprobs)[0]["unsafe"] for score in scores]
    difference = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    own_tokens = sum(len(tokenizer(text).input_ids) - PREAMBLE for text in texts) / len(texts)
    flops = 2 * model.num_parameters(exclude_embeddings=True) * own_tokens
    floor = flops / matmul_rate(device, dtype)
    table = Table("way", "verdicts/s", "ours is faster by")
    for way, each in seconds.items():
        table.add_row(way, f"{1 / each:.2f}", f"{each / seconds['ours']:.1f} x")
    console = Console()
    console.print(f"{arguments.shape}, {arguments.dtype}, {device} ({name(device)})")
    console.print(table)
    console.print(
        f"P(unsafe) differs from the plain pass by {difference:.1e} at most; the floor is "
        f"{1 / floor:.1f} verdicts/s, {seconds['ours'] / floor:.1f} x ours"
    )
    if arguments.json:
        record = {
            "device": name(device),
            "shape": arguments.shape,
            "lengths": arguments.lengths,
            "dtype": arguments.dtype,
            "seconds": seconds,
            "largest_difference": difference,
            "floor_seconds": floor,
            "unreadable": sum(verdict.label == "unreadable" for verdict in verdicts),
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
