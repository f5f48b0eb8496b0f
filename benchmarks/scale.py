"""What `mergekit_align.scale` predicts, against what is measured; and its plans for 8B and 70B.

    python benchmarks/scale.py --json scale.json             # SmolLM2-135M's shape, on the CPU
    python benchmarks/scale.py --measured scale.json --json scale.json    # predicts again, runs nothing
    python benchmarks/scale.py --device cuda --dtype bfloat16 --samples 256

Random weights. The rates that a prediction needs are measured just before: matrix products as large
as the model's own, a layer's attention and its arithmetic element by element, and copies of memory. On
a CPU one thread computes and its processor's seconds count, so that other work on the machine doesn't.
Each step runs twice in a process of its own, of which the second time counts; its memory is the peak
beyond what the process held before the model. The plans are at GPUs' published rates, of which matrix
products reach a half (`--share`) and memory nine tenths.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import (
    best_seconds,
    clock,
    copy_rate,
    matmul_rate,
    memory,
    name,
    new_memory_rate,
    new_pages_rate,
    peak_memory,
)
from mergekit.merge_methods import get
from mergekit.merge_methods.base import PerInputValues, TensorGroup
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from mergekit_align import scale
from mergekit_align.encoding import EncodedSample
from mergekit_align.gradient import mean_loss
from mergekit_align.guard.scorer import HuggingFaceScorer
from mergekit_align.guard.verdict import VerdictTree
from mergekit_align.loss import response_scores
from mergekit_align.process import keep_memory
from mergekit_align.scale import Machine, Shape, Step, Work
from mergekit_align.statistics.collect import _collect
from mergekit_align.statistics.files import Header, Kind

STEPS = ("loss", "merge", "guard", "gradient", "statistics")


class Size(NamedTuple):
    """Of a Llama."""

    layers: int
    hidden: int
    inner: int
    heads: int
    keys: int
    vocabulary: int
    tied: bool = False

    def config(self) -> PretrainedConfig:
        return AutoConfig.for_model(
            "llama",
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.keys,
            max_position_embeddings=8192,
            tie_word_embeddings=self.tied,
        )


SIZES = {
    "SmolLM2-135M": Size(30, 576, 1536, 9, 3, 49152, tied=True),
    "Llama-3.2-1B": Size(16, 2048, 8192, 32, 8, 128256, tied=True),
    "Llama-3-8B": Size(32, 4096, 14336, 32, 8, 128256),
    "Llama-3-70B": Size(80, 8192, 28672, 64, 8, 128256),
}
GIB = 2**30
# NVIDIA's data sheets: dense bfloat16, float32, memory, PCIe, bytes.
GPUS = {
    "A100 80 GB": (312e12, 19.5e12, 2.0e12, 32e9, 80e9),
    "H100 80 GB": (989e12, 67e12, 3.35e12, 64e9, 80e9),
}
PLANS = (
    ("Llama-3-8B", "A100 80 GB", 1),
    ("Llama-3-8B", "H100 80 GB", 1),
    ("Llama-3-70B", "H100 80 GB", 8),
)


def gpu(model: str, devices: int, share: float) -> Machine:
    """A published GPU, or a node of them."""
    matmul, float32, bandwidth, link, held = GPUS[model]
    return Machine(share * matmul, share * float32, 0.9 * bandwidth, 0.9 * link, held, devices)


def measured_machine(size: Size, work: Work, device: str, dtype: torch.dtype) -> Machine:
    """Rates of products as large as a batch's in this model's feed-forward layers, and of the rest."""
    keep_memory()
    tokens = 256 if device == "cpu" else 8192
    sizes = (tokens, size.hidden, size.inner)
    bandwidth = copy_rate(device)
    return Machine(
        matmul=matmul_rate(device, dtype, sizes),
        matmul_float32=matmul_rate(device, torch.float32, sizes),
        bandwidth=bandwidth,
        link=bandwidth if device == "cpu" else copy_rate(device, to="cpu"),
        memory=64 * GIB,
        itemsize=dtype.itemsize,
        cpu=device == "cpu",
        element_wise=element_wise_rate(size, work, device, dtype),
        attention=attention_rate(size, work, device, dtype),
        new_memory=new_memory_rate() if device == "cpu" else math.inf,
        new_pages=new_pages_rate(),
    )


def element_wise_rate(size: Size, work: Work, device: str, dtype: torch.dtype) -> float:
    """Bytes/s, as `Shape` counts them, of all in a decoder layer but products and attention."""
    config = size.config()
    texts, length, width = work.samples, work.prompt + work.response, size.hidden // size.heads

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(texts, *shape, device=device, dtype=dtype)

    norm = LlamaRMSNorm(size.hidden).to(device, dtype)
    rotary = LlamaRotaryEmbedding(config).to(device)
    states, queries = numbers(length, size.hidden), numbers(size.heads, length, width)
    keys, gate, up = numbers(size.keys, length, width), *(numbers(length, size.inner),) * 2
    places = torch.arange(length, device=device).unsqueeze(0)

    def layer() -> None:
        with torch.inference_mode():
            norm(states)
            apply_rotary_pos_emb(queries, keys, *rotary(states, places))
            norm(states + states)
            states + states
            torch.nn.functional.silu(gate) * up

    counted = Shape.of(config).element_wise // size.layers * texts * length * dtype.itemsize
    return counted / best_seconds(layer, device)


def attention_rate(size: Size, work: Work, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of attention as this model reaches them."""
    length, width = work.prompt + work.response, size.hidden // size.heads
    heads = torch.randn(3, work.samples, size.heads, length, width, device=device, dtype=dtype)

    def attend() -> None:
        queries, keys, values = heads
        torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)

    flops = 4.0 * work.samples * size.hidden * length**2
    return flops / best_seconds(attend, device)


def measure(step: str, size: str, work: Work, device: str, dtype: str) -> dict[str, float]:
    """Seconds and bytes of one step, in this process."""
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    rng, floating = random.Random(0), getattr(torch, dtype)
    floating = torch.float32 if step == "statistics" else floating
    before = memory()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SIZES[size].config(), dtype=floating).eval()

    def ids(count: int) -> list[int]:
        return rng.choices(range(SIZES[size].vocabulary), k=count)

    encoded = [EncodedSample(ids(work.prompt), ids(work.response)) for _ in range(work.samples)]
    policy = ids(work.policy)
    judged = [[*policy, *ids(work.conversation)] for _ in range(work.judged)]
    others = []
    if step == "merge":
        others = [{n: p.clone() for n, p in model.named_parameters()} for _ in range(work.models)]
    scorer = HuggingFaceScorer(model, None)

    def run(out: str) -> None:
        if step == "loss":
            response_scores(model, encoded)
        elif step == "gradient":
            mean_loss(model, encoded).accumulate()
        elif step == "merge":
            merge(model, others)
        elif step == "guard":
            judge(scorer, judged, policy)
        else:
            kinds: tuple[Kind, ...] = ("gram", "importance", "fisher")
            headers = {k: Header("", "", "", [], None, 0, "task", k, {}) for k in kinds}
            _collect(model, encoded, headers, Path(out))

    with tempfile.TemporaryDirectory() as out:
        run(out)  # libraries choose their kernels at first use
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        started = clock(device)
        run(out)
        seconds = clock(device) - started
    held = peak_memory() - before if device == "cpu" else torch.cuda.max_memory_allocated()
    return {"seconds": seconds, "bytes": held}


@torch.inference_mode()
def merge(model: Any, others: list[dict[str, torch.Tensor]]) -> None:
    """mergekit's linear merge of others' tensors into a model."""
    names = [str(number) for number in range(len(others))]
    weights = PerInputValues([(each, 1.0) for each in names])
    for name_, parameter in model.named_parameters():
        group = TensorGroup.from_tensors(
            [each[name_] for each in others], ids=names, base_index=None, name=name_
        )
        (merged,) = get("linear")([group], parameters={"weight": weights})
        parameter.copy_(merged)


def judge(scorer: HuggingFaceScorer, prompts: list[list[int]], policy: list[int]) -> None:
    """Verdicts' probabilities; what they would be decoded to is not wanted."""
    scorer.tokenizer = _Silent()
    scorer.scores(prompts, VerdictTree({(1,): "safe", (2,): "unsafe"}), preamble=tuple(policy))


class _Silent:
    def decode(self, ids: list[int]) -> str:
        return str(ids)


def predicted(shape: Shape, work: Work, machine: Machine) -> dict[str, Step]:
    return {step.step: step for step in scale.steps(shape, work, machine)}


def off(prediction: float, found: float) -> str:
    return f"{100 * (prediction / found - 1):+.0f}%"


def measured(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """What each step took, and the machine's rates just before."""
    device, dtype, size = arguments.device, arguments.dtype, arguments.model
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torch", "transformers", "mergekit.merge_methods"])
    count = arguments.samples
    work = Work(count, prompt=96, response=32, judged=count, policy=200, conversation=100)
    if device == "cpu":
        torch.set_num_threads(1)
    checked = []
    for step in arguments.step or STEPS:
        rates = measured_machine(SIZES[size], work, device, getattr(torch, dtype))
        with context.Pool(1) as pool:
            found = pool.apply(measure, (step, size, work, device, dtype))
        console.print(f"{step}: {found}")
        checked.append({"step": step, **found, "rates": rates._asdict()})
    return {
        "machine": name(device),
        "model": size,
        "dtype": dtype,
        "work": work._asdict(),
        "checked": checked,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="SmolLM2-135M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.5, help="of a GPU's published products")
    parser.add_argument("--step", action="append", choices=STEPS, help="this only; may be repeated")
    parser.add_argument(
        "--measured", type=Path, help="take what was measured, rates too, from this file"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    console = Console()
    if arguments.measured:
        record = json.loads(arguments.measured.read_text(encoding="utf-8"))
    else:
        record = measured(arguments, console)
    shape, work = Shape.of(SIZES[record["model"]].config()), Work(**record["work"])
    for each in record["checked"]:
        told = predicted(shape, work, Machine(**each["rates"]))[each["step"]]
        each |= {"predicted_seconds": told.seconds, "predicted_bytes": told.bytes}
    console.print(f"{record['model']}, {record['dtype']}, {record['machine']}, {work}")
    table = Table("step", "predicted s", "measured s", "off by", "MiB", "measured MiB", "off by")
    for each in record["checked"]:
        table.add_row(
            each["step"],
            f"{each['predicted_seconds']:.2f}",
            f"{each['seconds']:.2f}",
            off(each["predicted_seconds"], each["seconds"]),
            f"{each['predicted_bytes'] / 2**20:.0f}",
            f"{each['bytes'] / 2**20:.0f}",
            off(each["predicted_bytes"], each["bytes"]),
        )
    console.print(table)
    plans = []
    for model, card, devices in PLANS:
        planned = scale.steps(
            Shape.of(SIZES[model].config()), Work(), gpu(card, devices, arguments.share)
        )
        plans.append(
            {
                "model": model,
                "machine": card if devices == 1 else f"{devices} x {card}",
                "work": Work()._asdict(),
                "steps": [step._asdict() for step in planned],
            }
        )
        console.print(f"{model} on {plans[-1]['machine']}, computed, not measured; {Work()}")
        table = Table("step", "seconds", "GiB on GPU", "GiB on host or disk", "fits")
        for each in planned:
            table.add_row(
                each.step,
                f"{each.seconds:.1f}",
                f"{each.bytes / GIB:.0f}",
                f"{each.host_bytes / GIB:.0f}",
                "yes" if each.fits else "no",
            )
        console.print(table)
    if arguments.json:
        record["plans"] = plans
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
