"""The task's number, `loss.py`'s and a plain token-by-token reference are one number."""

from __future__ import annotations

from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_align.encoding import ResponseEncoder
from mergekit_align.errors import InputError
from mergekit_align.eval_task_files import eval_tasks_path
from mergekit_align.gradient import mean_loss
from mergekit_align.loss import ResponseReader, questions, response_scores, sample_scores
from mergekit_align.samples import load_samples
from mergekit_align.tasks import response as response_module


def _without_bos(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|begin_of_text|>", "")
    return tokenizer


@pytest.fixture(params=["template adds BOS", "template adds none"])
def tokenizer(request, world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    return _without_bos(tokenizer) if "none" in request.param else tokenizer


@pytest.fixture
def model(world):
    return AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32).eval()


def _reference_loss(model, tokenizer, sample) -> float:
    turns = [{"role": "user", "content": sample.prompt}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not prompt.startswith(tokenizer.bos_token)).input_ids
    losses = []
    answer = tokenizer(sample.response + "<|eot_id|>", add_special_tokens=False).input_ids
    for token in answer:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        losses.append(float(-logits.log_softmax(0)[token]))
        ids = [*ids, token]
    return sum(losses) / len(losses)


def _evaluate(model, tokenizer, data: Path, chat: bool = True, **kwargs):
    return lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=7),
        tasks=["response_alignment"],
        task_manager=TaskManager(
            include_path=str(eval_tasks_path()),
            include_defaults=False,
            metadata={"data": str(data)},
        ),
        apply_chat_template=chat,
        bootstrap_iters=0,
        **kwargs,
    )


def test_task_loss_and_reference_agree(model, tokenizer, world) -> None:
    data = world / "data" / "validation.jsonl"
    samples = [s for s in load_samples(data) if s.type == "alignment"][:12]
    reference = [_reference_loss(model, tokenizer, sample) for sample in samples]
    ours = [score.loss for score in sample_scores(model, tokenizer, samples)]
    result = _evaluate(model, tokenizer, data, limit=12)["results"]["response_alignment"]
    assert ours == pytest.approx(reference, abs=1e-4)
    assert result["logprob,none"] == pytest.approx(-sum(reference) / 12, abs=1e-4)


def test_what_prompts_share_is_read_once_and_changes_no_loss(model, tokenizer, world) -> None:
    kinds = ("alignment", "task")
    every = load_samples(world / "data" / "validation.jsonl")
    shared = {"alignment": "a b c d " * 20, "task": "e f g " * 25}
    samples = [
        sample.model_copy(update={"prompt": shared[kind] + sample.prompt})
        for kind in kinds
        for sample in [s for s in every if s.type == kind][:3]
    ]
    encoder = ResponseEncoder(tokenizer)
    encoded = [
        encoder.encode(encoder.render(s.prompt), s.response, templated=True) for s in samples
    ]
    read = sum(int(batch.read.sum()) for batch in ResponseReader(model, questions(encoded)).batches)
    assert read < sum(len(e.prompt_ids) + len(e.response_ids) for e in encoded) / 2
    reference = [_reference_loss(model, tokenizer, sample) for sample in samples]
    found = [score.loss for score in response_scores(model, encoded)]
    assert found == pytest.approx(reference, abs=1e-4)


def test_the_output_layer_is_not_copied_for_every_prompt(model, world) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    samples = load_samples(world / "data" / "validation.jsonl")[:12]
    model.requires_grad_(False)
    with torch.profiler.profile(record_shapes=True) as profile:
        sample_scores(model, tokenizer, samples)
    products = {
        event.name
        for event in profile.events()
        if event.name in ("aten::mm", "aten::bmm")
        and any(model.config.vocab_size in shape for shape in event.input_shapes)
    }
    assert products == {"aten::mm"}


def test_the_gradient_is_that_of_the_loss(model, world) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    samples = load_samples(world / "data" / "validation.jsonl")[:5]
    encoder = ResponseEncoder(tokenizer)
    encoded = [
        encoder.encode(encoder.render(s.prompt), s.response, templated=True) for s in samples
    ]
    scores = response_scores(model, encoded)
    loss = mean_loss(model, encoded).accumulate()
    assert loss == pytest.approx(sum(score.loss for score in scores) / len(scores), abs=1e-4)
    norm = model.model.norm.weight
    step = 1e-2 * norm.grad / norm.grad.norm()
    with torch.no_grad():
        norm += step
        after = response_scores(model, encoded)
    change = sum(score.loss for score in after) / len(after) - loss
    assert change == pytest.approx(float(norm.grad @ step), rel=0.05)


def test_another_backend_answers_the_same(model, world, monkeypatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    data = world / "data" / "validation.jsonl"
    fast = _evaluate(model, tokenizer, data, limit=8)["results"]["response_alignment"]
    monkeypatch.setattr(response_module, "HFLM", type("NoLocalModel", (), {}))
    other = _evaluate(model, tokenizer, data, limit=8)["results"]["response_alignment"]
    for metric in ("logprob,none", "decision_margin,none"):
        assert other[metric] == pytest.approx(fast[metric], abs=1e-4)


def test_the_decision_metrics_follow_from_the_margin(model, world) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    data = world / "data" / "validation.jsonl"
    result = _evaluate(model, tokenizer, data, limit=24, log_samples=True)
    scored = result["samples"]["response_alignment"]
    margins = torch.tensor([sample["decision_margin"] for sample in scored], dtype=torch.float64)
    for metric, expected in (
        ("decision_margin", margins),
        ("decision_logprob", margins.sigmoid().log()),
        ("decision_acc", (margins > 0).double()),
    ):
        assert [sample[metric] for sample in scored] == pytest.approx(expected.tolist(), abs=1e-9)
        mean = result["results"]["response_alignment"][f"{metric},none"]
        assert mean == pytest.approx(float(expected.mean()), abs=1e-9)


def test_without_a_chat_template_the_task_still_scores(model, world) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    data = world / "data" / "validation.jsonl"
    chat = _evaluate(model, tokenizer, data, limit=8)["results"]["response_alignment"]
    plain = _evaluate(model, tokenizer, data, chat=False, limit=8)["results"]["response_alignment"]
    assert plain["logprob,none"] < 0
    assert plain["logprob,none"] != chat["logprob,none"]


def test_process_docs_is_given_a_dataset_of_the_samples(world, tmp_path) -> None:
    (tmp_path / "helper.py").write_text(
        "def last(docs):\n    return docs.select([len(docs) - 1])\n"
    )
    for name, more in (("mine", ""), ("mine_last", "process_docs: !function helper.last\n")):
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {eval_tasks_path()}/responses/response_alignment.yaml\n"
            f"task: {name}\ndata: {world}/data/validation.jsonl\n{more}"
        )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    loaded = manager.load(["mine", "mine_last"])["tasks"]
    assert list(loaded["mine_last"].eval_docs) == loaded["mine"].eval_docs[-1:]
    assert loaded["mine_last"].features == loaded["mine"].features


def test_too_long_a_prompt_is_cut_on_its_left_and_too_long_a_response_is_an_error(world) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    encoder = ResponseEncoder(tokenizer, max_length=16)
    full = ResponseEncoder(tokenizer).encode("a b c d e f g h " * 9, "sorry", templated=True)
    cut = encoder.encode("a b c d e f g h " * 9, "sorry", templated=True)
    assert cut.response_ids == full.response_ids
    assert len(cut.prompt_ids) + len(cut.response_ids) == 16
    assert cut.prompt_ids[-5:] == full.prompt_ids[-5:]
    with pytest.raises(InputError, match="sorry sorry"):
        encoder.encode("a", "sorry " * 40, templated=True)


def test_a_class_with_results_of_its_own_is_scored_by_lm_eval(world) -> None:
    class Halved(response_module.ResponseTask):
        def process_results(self, doc, results):
            return {key: each / 2 for key, each in super().process_results(doc, results).items()}

    def loaded(kind):
        config = {"task": "own", "sample_type": "alignment"}
        data = str(world / "data" / "validation.jsonl")
        return {"tasks": {"own": kind({**config, "data": data})}}

    assert response_module.is_response_task(loaded(response_module.ResponseTask))
    assert not response_module.is_response_task(loaded(Halved))
