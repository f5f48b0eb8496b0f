"""What the reports of these tests are of: a small evaluation, and a small search."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path
from typing import Any

from mergekit_align.evaluate import Evaluation
from mergekit_align.evaluate.columns import Answered, answer_record, notes_on, sample_columns
from mergekit_align.evaluate.scores import make_column
from mergekit_align.guard import GuardSettings, Verdict
from mergekit_align.samples import Sample

REFUSAL = "I can't help with that."
HELP = "Sure, it is the blue one."


def judged(prompt: str, response: str) -> Verdict:
    """What a guard might have said: a refusal is safe, an empty answer unreadable."""
    if not response:
        return Verdict("unreadable", None, 0.0, 0.1, evidence="?")
    safe = response == REFUSAL
    return Verdict(
        "safe" if safe else "unsafe", 0.01 if safe else 0.9, 0.0, 1.0, () if safe else ("S9",)
    )


def make_evaluation(
    answers: dict[str, list[str]] | None = None,
    *,
    prompts: list[str] | None = None,
    models: dict[str, str] | None = None,
    tasks: dict[str, dict[str, list[float | None]]] | None = None,
) -> Evaluation:
    """Four unsafe prompts, two benign ones and two tasks, put to three models."""
    answers = answers or {
        "aligned": [REFUSAL] * 6 + ["red", "red"],
        "expert": [HELP, HELP, "", HELP, HELP, HELP, "blue", "blue"],
        "merged": [REFUSAL, REFUSAL, REFUSAL, HELP, HELP, HELP, "blue", "blue"],
    }
    prompts = prompts or [f"unsafe {i}" for i in range(4)] + ["a?", "b?", "colour?", "which?"]
    kinds = ["alignment"] * 4 + ["benign"] * 2 + ["task"] * 2
    expected = [REFUSAL] * 4 + [HELP] * 2 + ["blue"] * 2
    samples = [
        Sample(prompt=prompt, response=response, type=kind, category=f"C{index % 2}")
        for index, (prompt, response, kind) in enumerate(zip(prompts, expected, kinds, strict=True))
    ]
    answered = {name: Answered(responses, []) for name, responses in answers.items()}
    verdicts = {
        name: [
            judged(sample.prompt, response) if sample.type == "alignment" else None
            for sample, response in zip(samples, responses, strict=True)
        ]
        for name, responses in answers.items()
    }
    columns = sample_columns(samples, answered, verdicts, 0)
    columns |= {name: make_column(name, outcomes) for name, outcomes in (tasks or {}).items()}
    settings = GuardSettings(model="some-guard")
    return Evaluation(
        models or {name: f"models/{name}" for name in answers},
        columns,
        True,
        notes_on(settings, "llama-guard-3", samples, verdicts),
        {"seed": 0, "limit": None, "max_tokens": 64, "backend": "hf", "dtype": "float32",
         "guard": "some-guard", "threshold": 0.5, "data": ["/data/test set.jsonl"], "tasks": [],
         "apply_chat_template": True, "mergekit-align": "0.1.0"},
        [answer_record(index, sample, answered, verdicts) for index, sample in enumerate(samples)],
    )  # fmt: skip


GENES = [
    [f"weight ({model}, layers {layer}-{layer})", 0.0, 2.0, 1.0]
    for layer in (0, 1)
    for model in ("aligned", "expert")
]
SEARCHED: list[tuple[tuple[float, float, float] | None, float]] = [
    ((-2.0, -1.0, -0.4), 0.0),
    ((-1.0, -0.5, -0.6), 0.0),  # the best feasible one
    (None, 0.0),
    ((-0.1, -0.1, -0.1), 0.3),  # fitter, but it misses a floor
    ((-0.5, -3.0, -0.5), 0.0),
    ((-2.5, -3.5, -0.9), 0.0),  # beaten on both axes
]
"""A candidate's alignment, skill and benign metrics (`None`: it failed); by what it misses floors."""


def write_study_to(path: Path, objectives: list[str] | None = None, **changes: Any) -> Path:
    """A study as `mergekit-align-evolve` keeps it, of the candidates of `SEARCHED`.

    Args:
        changes: of what the study says of its config.
    """
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    names = objectives or ["fitness"]
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(
        study_name="mergekit-align-evolve",
        storage=storage,
        directions=["maximize"] * len(names),
    )
    weights = {"response_alignment": 1.0, "skill": 0.3, "response_benign": 0.5}
    config = {
        "searcher": "cma", "objectives": names, "floors": {"skill": -4.0}, "genes": GENES,
        "genome": {"merge_method": "linear"}, "random_seed": 3,
        "tasks": [
            {"name": task, "weight": weight, "metric": "logprob,none"}
            for task, weight in weights.items()
        ],
        **changes,
    }  # fmt: skip
    study.set_user_attr("config", config)
    for number, (metrics, missed) in enumerate(SEARCHED):
        results = {}
        values: list[float] | None = None
        if metrics is not None:
            results = {
                task: {"logprob,none": value} for task, value in zip(weights, metrics, strict=True)
            }
            fitness = math.fsum(w * v for w, v in zip(weights.values(), metrics, strict=True))
            values = [fitness] if objectives is None else list(metrics[: len(names)])
        genotype = [0.1 * number + 0.2 * gene for gene in range(4)]
        trial = create_trial(
            state=TrialState.FAIL if values is None else TrialState.COMPLETE,
            values=values,
            params={gene[0]: value for gene, value in zip(GENES, genotype, strict=True)},
            distributions={gene[0]: FloatDistribution(0.0, 2.0) for gene in GENES},
            user_attrs={
                "asked": number, "asks": number + 1, "genotype": genotype, "violations": [missed],
                "results": results, "seconds": 1.5, "seed": 3,
                **({"failure": "out of <memory>"} if values is None else {}),
            },
        )  # fmt: skip
        trial.datetime_start = datetime.now()
        study.add_trial(trial)
    return path
