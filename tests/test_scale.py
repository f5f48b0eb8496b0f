"""The calculator's counts are those of models that are really made and run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from mergekit_align import scale
from mergekit_align.demo.models import ARCHITECTURES, new_model
from mergekit_align.demo.tokenizer import build_tokenizer
from mergekit_align.encoding import EncodedSample
from mergekit_align.gradient import sample_loss
from mergekit_align.scale import Machine, Shape, Work
from mergekit_align.statistics.collect import Source, collect_statistics
from mergekit_align.statistics.files import find_statistics

MACHINE = Machine(matmul=1e14, matmul_float32=1e13, bandwidth=1e12, link=1e10, memory=80e9)
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def llama(**changes: int) -> Shape:
    return Shape.of(AutoConfig.for_model("llama", **{**LLAMA_8B, **changes}))


def test_llama_3_8b_is_counted_without_its_weights() -> None:
    shape = llama()
    assert shape.parameters == 8_030_261_248
    assert shape.output == 128256 * 4096
    assert shape.cache == 2 * 8 * 128 * 32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_are_those_that_torch_counts(architecture: str) -> None:
    model = new_model(architecture, build_tokenizer(), seed=0).eval()  # type: ignore[arg-type]
    shape = Shape.of(model.config)
    assert shape.parameters == model.num_parameters()
    sample = EncodedSample(list(range(5, 45)), list(range(50, 70)))
    model.set_attn_implementation("eager")  # whose products torch counts on every device
    with FlopCounterMode(display=False) as counter:
        sample_loss(model, sample).backward()
    # A prediction more than it has response tokens, whose logits are dropped.
    expected = 3 * shape.flops(tokens=60, context=60, predicted=21)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_gram_matrices_have_the_size_of_the_files(world: Path, tmp_path: Path) -> None:
    source = Source([world / "data" / "validation.jsonl"], limit=1)
    collect_statistics(f"{world}/aligned", source, tmp_path, types=["task"])
    (file,) = find_statistics(tmp_path, "gram")
    shape = Shape.of(AutoConfig.from_pretrained(world / "aligned"))
    assert sum(file[name].numel() for name in file.names) == shape.gram


def test_what_a_batch_keeps_for_the_backward_pass_is_near_what_autograd_saves() -> None:
    model = new_model("llama", build_tokenizer(), seed=0).eval()
    shape = Shape.of(model.config)
    weights = {p.data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.arange(200).reshape(2, 100)
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert sum(saved.values()) == pytest.approx(200 * shape.saved * 4, rel=0.3)
    assert states.requires_grad


def test_a_spread_model_runs_at_the_rate_of_one_device() -> None:
    shape, node = llama(num_hidden_layers=400), MACHINE._replace(devices=8)
    one, all_ = (scale.loss(shape, Work(), each) for each in (MACHINE, node))
    assert not one.fits
    assert all_.fits
    assert all_.seconds == pytest.approx(one.seconds)
    assert scale.loss(llama(), Work(), node).seconds == pytest.approx(
        scale.loss(llama(), Work(), MACHINE).seconds / 8
    )


def test_more_vocabulary_takes_no_more_memory_than_its_weights_and_the_bound() -> None:
    work = Work(response=512)
    small, large = (llama(vocab_size=size) for size in (32768, 262144))
    more = scale.loss(large, work, MACHINE).bytes - scale.loss(small, work, MACHINE).bytes
    assert more <= 2 * (large.parameters - small.parameters) + 12 * scale.BATCH_LOGITS
