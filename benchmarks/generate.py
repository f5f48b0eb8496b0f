"""Generation against lm-eval's own, and how fast near-duplicates are found.

    python benchmarks/generate.py demo-world/aligned            # 512 prompts, 32 tokens at most
    python benchmarks/generate.py MODEL --prompts 64 --max-tokens 64 --json generate.json

Both generate greedily through the chat template, from the same weights and in batches of the same size:
lm-eval's `generate_until` is given all prompts at once; ours puts every batch on disk as it comes. They
take turns; the fastest round counts. Then 100,000 random prompts, a tenth of them nearly other
ones, are deduplicated and held against 10,000 evaluation prompts, in one process.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from lm_eval.api.instance import Instance
from machine import name
from rich.console import Console
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from mergekit_align.demo.corpus import Corpus
from mergekit_align.devices import default_device
from mergekit_align.evaluate.models import make_backend
from mergekit_align.generate.config import PoolModel
from mergekit_align.generate.filter import Filter
from mergekit_align.generate.settings import Quality, Sampling
from mergekit_align.generate.work import Worker
from mergekit_align.journal import Journal


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Prompts of very different lengths, as generation meets them."""
    rng = random.Random(0)
    texts = [prompt.text for prompt in Corpus(0).prompts["train"]]
    return [
        [{"role": "user", "content": " ".join(rng.sample(texts, rng.choice((1, 1, 2, 4))))}]
        for _ in range(count)
    ]


def generation(
    model: str, count: int, max_tokens: int, batch_size: int, rounds: int
) -> tuple[dict[str, list[float]], int]:
    """Seconds of each round, by who generates; and how many answers are the same.

    In bfloat16 an answer may turn on what is read beside it; in float32 none does.
    """
    device = default_device()
    backend = make_backend("hf", {}, device=device, batch_size=batch_size)
    asked = conversations(count)
    lm = backend.load(model)
    requests = [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=(
                lm.apply_chat_template(messages),
                {"until": [], "max_gen_toks": max_tokens, "do_sample": False},
            ),
            idx=0,
        )
        for messages in asked
    ]
    chosen = PoolModel("model", model, backend, None)
    sampling = Sampling(max_tokens=max_tokens)
    seconds: dict[str, list[float]] = {"lm-eval": [], "ours": []}
    with tempfile.TemporaryDirectory() as directory:
        journal = Journal(Path(directory) / "answers", "benchmark", 0, holds="another")
        worker = Worker(journal, rank=0, processes=1, wait=lambda: None)
        worker.replies(chosen, asked[:batch_size], sampling, key="warm", seed=0)
        lm.generate_until(requests[:batch_size], disable_tqdm=True)
        for number in range(rounds):
            started = time.perf_counter()
            expected = lm.generate_until(requests, disable_tqdm=True)
            seconds["lm-eval"].append(time.perf_counter() - started)
            started = time.perf_counter()
            replies = worker.replies(chosen, asked, sampling, key=str(number), seed=0)
            seconds["ours"].append(time.perf_counter() - started)
            alike = sum(r.text == text for r, text in zip(replies, expected, strict=True))
    return seconds, alike


def deduplication(count: int, evaluation: int) -> tuple[float, float, int, int]:
    """Seconds by the clock and of the processor; how many prompts were contaminated and duplicates."""
    rng = random.Random(0)
    letters = "abcdefghiklmnoprstuvwyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20000)]

    def sentence() -> str:
        return " ".join(rng.choices(words, k=rng.randint(8, 25)))

    def near(text: str) -> str:
        own = text.split()
        own[rng.randrange(len(own))] = rng.choice(words)
        return " ".join(own).title()

    tests = [sentence() for _ in range(evaluation)]
    prompts = [sentence() for _ in range(count * 9 // 10)]
    prompts += [near(rng.choice([*prompts[:1000], *tests[:1000]])) for _ in range(count // 10)]
    rng.shuffle(prompts)
    started, computing = time.perf_counter(), time.process_time()
    chosen = Filter(Quality(), None, tests)
    reasons = [chosen.reason_against("alignment", text, text) for text in prompts]
    seconds = time.perf_counter() - started
    computing = time.process_time() - computing
    return seconds, computing, reasons.count("contaminated"), reasons.count("duplicate")


def main() -> None:
    disable_progress_bar()
    set_verbosity_error()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--duplicates", type=int, default=100_000, help="prompts to deduplicate")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    console = Console()
    console.print(name(default_device()))
    seconds, alike = generation(
        arguments.model,
        arguments.prompts,
        arguments.max_tokens,
        arguments.batch_size,
        arguments.rounds,
    )
    best = {who: min(times) for who, times in seconds.items()}
    ratio = best["ours"] / best["lm-eval"]
    for who, times in seconds.items():
        rounds = ", ".join(f"{each:.1f}" for each in times)
        console.print(f"{who}: {best[who]:.1f} s for {arguments.prompts} answers ({rounds})")
    console.print(
        f"ours / lm-eval: {ratio:.3f}; {alike} of {arguments.prompts} answers are the same"
    )
    taken, computing, contaminated, duplicates = deduplication(arguments.duplicates, 10_000)
    console.print(
        f"{arguments.duplicates} prompts: {contaminated} contaminated, {duplicates} duplicates, in "
        f"{taken:.1f} s ({computing:.1f} s of one processor)"
    )
    if arguments.json:
        record = {
            "device": name(default_device()),
            "seconds": seconds,
            "ratio": ratio,
            "deduplication_seconds": taken,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
