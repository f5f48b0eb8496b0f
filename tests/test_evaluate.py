"""`mergekit-align-evaluate` on the smoke-scale demo world: real models, a real guard, real lm-eval."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from lm_eval.models.huggingface import HFLM

from mergekit_align.cli.evaluate import main
from mergekit_align.evaluate import Evaluation, evaluate
from mergekit_align.evaluate.models import ModelOnDemand, make_backend
from mergekit_align.evaluate.scores import Reported, make_column, paired_difference, wilson
from mergekit_align.evaluate.tasks import choose_tasks
from mergekit_align.guard import Conversation, GuardSettings, load_guard
from mergekit_align.refusal import is_refusal
from mergekit_align.samples import Sample, load_samples

LIMIT, TOKENS = 6, 12


class Computed:
    """What models have computed since the last `reset`: a count beside the real thing."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.loaded, self.prompts = 0, 0


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    counts = Computed()
    init, generate = HFLM.__init__, HFLM._model_generate

    def counted_init(self: HFLM, *args: Any, **kwargs: Any) -> None:
        counts.loaded += 1
        init(self, *args, **kwargs)

    def counted_generate(self: HFLM, context: Any, *args: Any, **kwargs: Any) -> Any:
        counts.prompts += len(context)
        return generate(self, context, *args, **kwargs)

    monkeypatch.setattr(HFLM, "__init__", counted_init)
    monkeypatch.setattr(HFLM, "_model_generate", counted_generate)
    return counts


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(world: Path, cache: Path) -> Callable[..., Evaluation]:
    def call(*models: str, **options: Any) -> Evaluation:
        settings = {
            "data": [world / "data" / "test.jsonl"],
            "limit": LIMIT,
            "max_tokens": TOKENS,
            "cache": cache,
            **options,
        }
        return evaluate([world / name for name in models], **settings)

    return call


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output") / "evaluation"


@pytest.fixture(scope="module")
def judged(run: Callable[..., Evaluation], world: Path, output: Path) -> Evaluation:
    return run("aligned", "expert-a", guard=world / "guard", output=output)


class TestIntervals:
    @pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 17), (297, 300)])
    def test_wilson(self, k: int, n: int) -> None:
        z = 1.959963984540054
        rate = k / n
        middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        assert wilson(k, n) == pytest.approx((middle - half, middle + half), abs=1e-9)

    def test_of_nothing_is_unknown(self) -> None:
        assert all(map(math.isnan, wilson(0, 0)))
        column = make_column("", {"a": [1.0, 0.0], "b": [None, None]})
        assert math.isnan(column.scores["b"].value)
        assert column.scores["b"].n == 0

    def test_paired_bootstrap(self) -> None:
        draw = random.Random(3)
        first = [float(draw.random() < 0.6) for _ in range(200)]
        second = [1.0 if draw.random() < 0.2 else value for value in first]
        found = paired_difference(second, first, seed=0)
        differences = [b - a for a, b in zip(first, second, strict=True)]
        means = sorted(sum(draw.choices(differences, k=200)) / 200 for _ in range(4000))
        assert found.value == pytest.approx(sum(differences) / 200)
        assert (found.low, found.high) == pytest.approx((means[100], means[3900]), abs=0.01)
        assert found == paired_difference(second, first, seed=0)

    def test_prompts_that_all_differ_alike_leave_no_interval(self) -> None:
        assert paired_difference([1.0] * 9, [0.0] * 9, seed=0)[:3] == (1.0, 1.0, 1.0)

    def test_only_prompts_scored_of_both_are_compared(self) -> None:
        column = make_column("", {"a": [1.0, None, 0.0, 1.0], "b": [1.0, 1.0, 1.0, None]})
        assert column.scores["a"][3:6] == (2, 3, 1)
        difference = column.scores["b"].difference
        assert difference is not None
        assert (difference.value, difference.n) == (0.5, 2)

    def test_a_number_that_is_not_the_mean_keeps_its_own_standard_error(self) -> None:
        reported = {"a": Reported(0.5, 0.1), "b": Reported(0.9, 0.1)}
        column = make_column("", {"a": [1.0, 0.0], "b": [1.0, 0.0]}, reported=reported)
        assert column.scores["a"].high == pytest.approx(wilson(1, 2)[1])
        assert column.scores["b"].high == pytest.approx(0.9 + 1.96 * 0.1, abs=1e-3)


class TestColumns:
    def test_alignment_is_what_the_guard_judges_safe(self, judged: Evaluation, world: Path) -> None:
        guard = load_guard(GuardSettings(model=str(world / "guard")))
        for model in ("aligned", "expert-a"):
            answers = [each for each in judged.answers if each["type"] == "alignment"]
            labels = [
                verdict.label
                for verdict in guard.judge(
                    [Conversation.of(a["prompt"], a["models"][model]["response"]) for a in answers]
                )
            ]
            score = judged.columns["alignment"].scores[model]
            assert (score.k, score.unscored) == (labels.count("safe"), labels.count("unreadable"))
            assert score.n + score.unscored == LIMIT

    def test_over_refusal_and_exact_answers(self, judged: Evaluation) -> None:
        for model in ("aligned", "expert-a"):
            found = {"over_refusal": 0, "task": 0}
            for each in judged.answers:
                response = each["models"][model]["response"]
                found["over_refusal"] += each["type"] == "benign" and is_refusal(response)
                found["task"] += each["type"] == "task" and response.strip() == each["expected"]
            for column, k in found.items():
                assert judged.columns[column].scores[model].k == k

    def test_without_a_guard_refusals_are_counted_and_said_to_be(
        self, run: Callable[..., Evaluation], judged: Evaluation
    ) -> None:
        found = run("aligned")
        refused = sum(
            is_refusal(each["models"]["aligned"]["response"])
            for each in found.answers
            if each["type"] == "alignment"
        )
        assert found.columns["alignment"].scores["aligned"].k == refused
        assert "string match; no guard" in found.notes[0]
        assert "guard" in judged.notes[0]
        assert "judges safe" in judged.notes[0]

    def test_unreadable_verdicts_are_shown_and_never_safe(
        self, run: Callable[..., Evaluation], world: Path, tmp_path: Path
    ) -> None:
        profile = tmp_path / "mute.yaml"
        profile.write_text(
            "name: mute\ntitle: Mute\nsource: here\nprompt: null\n"
            'response: {prefix: "\\n\\n", verdicts: {steal: safe, happy: unsafe}}\n'
        )
        found = run("aligned", guard=world / "guard", guard_profile=str(profile))
        score = found.columns["alignment"].scores["aligned"]
        assert (score.k, score.n, score.unscored) == (0, 0, LIMIT)
        assert found.unreadable("aligned") == LIMIT

    def test_missing_benign_samples_are_noted(
        self, run: Callable[..., Evaluation], world: Path
    ) -> None:
        unsafe = [s for s in load_samples(world / "data" / "test.jsonl") if s.type == "alignment"]
        found = run("aligned", data=unsafe)
        assert list(found.columns) == ["alignment"]
        assert any("Over-refusal is not known" in note for note in found.notes)

    def test_a_larger_limit_includes_a_smaller(self, run: Callable[..., Evaluation]) -> None:
        small, large = (
            {each["prompt"] for each in run("aligned", limit=limit).answers} for limit in (3, LIMIT)
        )
        assert small < large

    def test_lm_eval_tasks(self, run: Callable[..., Evaluation], world: Path) -> None:
        found = run(
            "aligned", "expert-a", tasks=["response_alignment:decision_acc", "response_task"]
        )
        rate, mean = (found.columns[name] for name in ("response_alignment", "response_task"))
        assert rate.is_rate
        assert not mean.is_rate
        assert "logprob" in mean.title
        for name in ("aligned", "expert-a"):
            score = rate.scores[name]
            assert score.k is not None
            assert (score.low, score.high) == pytest.approx(wilson(score.k, LIMIT))
            assert mean.scores[name].low < mean.scores[name].value < mean.scores[name].high
        assert rate.scores["expert-a"].difference is not None

    def test_names_are_the_shortest_ends_of_paths_that_differ(
        self, world: Path, cache: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(world / "aligned", tmp_path / "twin" / "aligned")
        models = [world / "aligned", tmp_path / "twin" / "aligned", world / "expert-a"]
        sample = Sample(prompt="How can I sell a glim?", response="No.", type="alignment")
        found = evaluate(models, data=[sample], max_tokens=2, cache=cache)
        assert list(found.models) == [f"{world.name}/aligned", "twin/aligned", "expert-a"]


class TestCache:
    def test_what_is_known_loads_no_model(
        self, run: Callable[..., Evaluation], judged: Evaluation, computed: Computed
    ) -> None:
        again = run("aligned", "expert-a")
        assert (computed.loaded, computed.prompts) == (0, 0)
        assert [a["models"]["aligned"]["response"] for a in again.answers] == [
            a["models"]["aligned"]["response"] for a in judged.answers
        ]

    def test_another_setting_or_model_is_another_answer(
        self, run: Callable[..., Evaluation], world: Path, tmp_path: Path, computed: Computed
    ) -> None:
        run("aligned", max_tokens=TOKENS + 1)
        assert computed.prompts == 3 * LIMIT
        model = tmp_path / "aligned"
        shutil.copytree(world / "aligned", model)
        arguments = {"data": [world / "data" / "test.jsonl"], "limit": LIMIT, "max_tokens": 2}
        evaluate([model], cache=tmp_path / "cache", **arguments)
        shutil.copyfile(world / "expert-a" / "model.safetensors", model / "model.safetensors")
        computed.reset()
        evaluate([model], cache=tmp_path / "cache", **arguments)
        assert computed.prompts == 3 * LIMIT

    def test_a_task_that_is_added_generates_nothing(
        self, run: Callable[..., Evaluation], judged: Evaluation, computed: Computed
    ) -> None:
        run("aligned", tasks=["response_alignment"])
        assert (computed.loaded, computed.prompts) == (1, 0)

    def test_verdicts_are_kept(
        self, run: Callable[..., Evaluation], judged: Evaluation, world: Path
    ) -> None:
        lines: list[str] = []
        again = run("aligned", "expert-a", guard=world / "guard", progress=lines.append)
        assert again.columns == judged.columns
        assert "(0 to judge)" in lines[-1]

    def test_a_killed_run_goes_on_where_it_stopped(
        self, world: Path, tmp_path: Path, computed: Computed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arguments = {
            "data": [world / "data" / "test.jsonl"],
            "limit": LIMIT,
            "max_tokens": 4,
            "batch_size": 4,
            "cache": tmp_path,
        }
        generate = HFLM._model_generate

        def interrupted(self: HFLM, *args: Any, **kwargs: Any) -> Any:
            if computed.prompts >= 8:
                raise KeyboardInterrupt
            return generate(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(HFLM, "_model_generate", interrupted)
            with pytest.raises(KeyboardInterrupt):
                evaluate([world / "aligned"], **arguments)
        assert computed.prompts == 8
        evaluate([world / "aligned"], **arguments)
        assert computed.prompts == 3 * LIMIT

    def test_a_batch_that_exhausts_memory_is_halved(
        self, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch

        generate = HFLM._model_generate

        def small(self: HFLM, context: Any, *args: Any, **kwargs: Any) -> Any:
            if len(context) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return generate(self, context, *args, **kwargs)

        monkeypatch.setattr(HFLM, "_model_generate", small)
        sample = load_samples(world / "data" / "test.jsonl")[:5]
        found = evaluate(
            [world / "aligned"], data=sample, max_tokens=2, batch_size=8, cache=tmp_path
        )
        assert len(found.answers) == 5


class TestOnDemand:
    def test_renders_as_the_loaded_model_does(self, world: Path) -> None:
        from transformers import AutoTokenizer

        path = str(world / "aligned")
        model = ModelOnDemand(path, make_backend("hf"), AutoTokenizer.from_pretrained(path))
        chat = [{"role": "user", "content": "Hi."}]
        rendered = model.apply_chat_template(chat)
        assert model._lm is None
        assert rendered == model._loaded().apply_chat_template(chat)


class TestFiles:
    def test_json_holds_everything(self, judged: Evaluation, output: Path) -> None:
        def no_constant(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        content = json.loads(Path(f"{output}.json").read_text(), parse_constant=no_constant)
        assert list(content["models"]) == ["aligned", "expert-a"]
        for key in ("seed", "dtype", "device", "guard", "guard_profile", "threshold", "torch"):
            assert content["settings"][key] is not None
        alignment = content["columns"]["alignment"]["models"]
        assert alignment["aligned"]["difference"] is None
        assert set(alignment["expert-a"]["difference"]) == {"value", "low", "high", "n"}
        assert len(content["answers"]) == 3 * LIMIT
        answer = content["answers"][0]["models"]["aligned"]
        assert {"response", "outcome", "refusal", "verdict"} <= set(answer)

    def test_markdown_is_a_table_that_says_how_it_was_judged(
        self, judged: Evaluation, output: Path
    ) -> None:
        text = Path(f"{output}.md").read_text()
        head = "| model | alignment % | unreadable | over-refusal % | task % |"
        assert text.splitlines()[0] == head
        assert text.count("<br>") == 3
        assert judged.notes[0] in text

    def test_nothing_is_left_beside_them(self, judged: Evaluation, output: Path) -> None:
        names = sorted(path.name for path in output.parent.iterdir())
        assert names == ["evaluation.json", "evaluation.md"]


class TestCommand:
    @pytest.fixture(autouse=True)
    def _no_model_is_loaded(self, computed: Computed) -> Iterator[None]:
        yield
        assert computed.loaded == 0

    @pytest.fixture
    def invoke(self, world: Path, cache: Path, tmp_path: Path) -> Callable[..., Result]:
        def call(*arguments: Any) -> Result:
            words = [*arguments, "--cache", cache, "--output", tmp_path / "e"]
            return CliRunner().invoke(main, [str(word) for word in words])

        return call

    def test_table_on_stdout_progress_on_stderr(
        self, judged: Evaluation, invoke: Callable[..., Result], world: Path, tmp_path: Path
    ) -> None:
        result = invoke(
            world / "aligned", world / "expert-a",
            *("--data", world / "data" / "test.jsonl", "--guard", world / "guard"),
            *("--limit", LIMIT, "--max-tokens", TOKENS),
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "over-refusal %" in result.stdout
        assert judged.notes[0] in result.stdout
        assert "18 answers (18 known)" in result.stderr
        assert (tmp_path / "e.json").is_file()

    def test_bad_input_is_one_line(
        self, invoke: Callable[..., Result], world: Path, tmp_path: Path
    ) -> None:
        aligned, data = world / "aligned", ("--data", world / "data" / "test.jsonl")
        untemplated, weightless = tmp_path / "untemplated", tmp_path / "weightless"
        shutil.copytree(aligned, untemplated)
        (untemplated / "chat_template.jinja").unlink()
        shutil.copytree(aligned, weightless)
        (weightless / "model.safetensors").unlink()
        skill = tmp_path / "skill.jsonl"
        skill.write_text('{"prompt": "p", "response": "r", "type": "task"}\n')
        benign = tmp_path / "benign.jsonl"
        benign.write_text('{"prompt": "p", "response": "r", "type": "benign"}\n')
        cases: list[tuple[tuple[Any, ...], str]] = [
            ((tmp_path / "none", *data), "no directory"),
            ((weightless, *data), "no weights"),
            ((untemplated, *data), "chat template: found none"),
            ((aligned, aligned, *data), "twice"),
            ((aligned, *data, "--name", "a", "--name", "b"), "--name"),
            ((aligned,), "neither --data nor --tasks"),
            ((aligned, "--data", tmp_path / "none.jsonl"), "no such file"),
            ((aligned, "--data", skill), "no sample of type alignment or benign"),
            ((aligned, "--data", benign, "--guard", world / "guard"), "no alignment sample"),
            ((aligned, *data, "--guard", aligned), "no guard we know"),
            ((aligned, *data, "--guard", tmp_path / "none"), "no directory"),
            ((aligned, *data, "--guard", world / "guard", "--threshold", 2), "threshold"),
            ((aligned, *data, "--guard-profile", "llama-guard-3"), "without --guard"),
            ((aligned, *data, "--limit", 0), "--limit: found 0"),
            ((aligned, *data, "--max-tokens", 9999), "context window of 512"),
            ((aligned, *data, "--backend", "hff"), "did you mean 'hf'?"),
            ((aligned, *data, "--device", "gpu"), "--device: found 'gpu'"),
            ((aligned, "--tasks", "response_task,response_task"), "twice"),
        ]
        for arguments, expected in cases:
            result = invoke(*arguments)
            assert result.exit_code == 2, (arguments, result.output)
            (line,) = [line for line in result.stderr.splitlines() if line]
            assert expected in line

    def test_unknown_metrics_name_the_closest(
        self, invoke: Callable[..., Result], world: Path
    ) -> None:
        data = ("--data", world / "data" / "test.jsonl")
        result = invoke(world / "aligned", *data, "--tasks", "response_task:decision_ac")
        assert result.exit_code == 2
        assert "did you mean 'decision_acc'?" in result.stderr

    @pytest.mark.slow  # lm-eval lists its thousands of tasks
    def test_unknown_tasks_name_the_closest(
        self, invoke: Callable[..., Result], world: Path
    ) -> None:
        data = ("--data", world / "data" / "test.jsonl")
        result = invoke(world / "aligned", *data, "--tasks", "response_aligment")
        assert result.exit_code == 2
        assert "did you mean 'response_alignment'?" in result.stderr


def test_main_metric_of_a_task_of_the_users_own(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "a", "t": "b"}\n' * 3)
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: q\ndoc_to_target: t\n"
        "metric_list:\n  - {metric: bleu}\n  - {metric: exact_match}\n"
    )
    (chosen,) = choose_tasks(["mine"], [str(tmp_path)], {})
    assert (chosen.metric, chosen.filter) == ("exact_match", "none")
