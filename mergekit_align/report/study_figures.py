"""Figures of a search: its trade-off, its progress, and the weights that it chose, by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mergekit_align.report.figures import (
    CHOSEN,
    MUTED,
    REFUSED,
    SAFE,
    SCALE,
    Figure,
    Titles,
)
from mergekit_align.report.study_file import Candidate, Metric, StudyRecord
from mergekit_align.report.text import brief, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY = 2000
"""Marks from which on a figure holds them as one picture."""


class Axis(NamedTuple):
    """A metric that candidates are drawn by."""

    metric: Metric
    sign: float
    """-1 where the search wants it low."""

    @property
    def label(self) -> str:
        return f"{brief(self.metric[0], 40)} {brief(self.metric[1].removesuffix(',none'), 30)}"

    def worth(self, candidate: Candidate) -> float:
        return self.sign * candidate.result(self.metric)


class Axes3(NamedTuple):
    """What is set against what."""

    skill: Axis
    alignment: Axis
    third: Axis | None
    """Over-refusal, where it is scored: the colour of the marks."""


def axes_of(study: StudyRecord) -> Axes3 | None:
    """Alignment against task, by the tasks' names; of several objectives the first two."""
    metrics = study.metrics
    objectives = [_metric(each, metrics) for each in study.objectives]
    if len(objectives) > 1 and None not in objectives:
        pair = [each for each in objectives if each is not None]
        alignment, skill = pair[:2]
        rest = [each for each in [*pair[2:], *metrics] if each not in pair[:2]]
    else:
        benign = [each for each in metrics if re.search("benign|refus", each[0])]
        safe = [each for each in metrics if re.search("align|guard|safe|harm", each[0])]
        others = [each for each in metrics if each not in benign and each not in safe]
        order = [*safe, *others, *benign]
        if len(order) < 2:
            return None
        alignment, skill = order[0], order[len(safe)] if others and safe else order[1]
        rest = [each for each in benign if each not in (alignment, skill)]

    def axis(metric: Metric) -> Axis:
        return Axis(metric, -1.0 if study.weight(metric) < 0 else 1.0)

    return Axes3(axis(skill), axis(alignment), axis(rest[0]) if rest else None)


def front(study: StudyRecord, axes: Axes3) -> list[Candidate]:
    """Feasible candidates that none is better than on both axes, by rising skill."""
    feasible = [
        each
        for each in study.candidates
        if each.evaluation.complete and not each.evaluation.violation
    ]
    ranked = sorted(
        feasible,
        key=lambda each: (axes.skill.worth(each), axes.alignment.worth(each)),
        reverse=True,
    )
    found: list[Candidate] = []
    for each in ranked:
        if not found or axes.alignment.worth(each) > axes.alignment.worth(found[-1]):
            found.append(each)
    return found[::-1]


def figures(study: StudyRecord, key: str) -> list[Figure]:
    """What can be drawn of a search."""
    drawn = [_trade_off(study, key), _progress(study, key), _weights(study, key)]
    return [each for each in drawn if each is not None]


def _trade_off(study: StudyRecord, key: str) -> Figure | None:
    chosen_axes, best = axes_of(study), study.best
    if chosen_axes is None or best is None:
        return None
    axes3 = chosen_axes
    scored = [each for each in study.candidates if each.evaluation.values is not None]
    best_ones = front(study, axes3)
    third = f", coloured by {axes3.third.label}" if axes3.third else ""
    alt = (
        f"Scatter plot of {len(scored)} candidates. Across: {axes3.skill.label}. Up: "
        f"{axes3.alignment.label}{third}. {len(best_ones)} are on the front. The chosen one, number "
        f"{best.number}, has {best.result(axes3.skill.metric):.4g} across and "
        f"{best.result(axes3.alignment.metric):.4g} up."
    )

    def draw(axes: Axes) -> Titles:
        feasible = [each for each in scored if not each.evaluation.violation]
        missing = [each for each in scored if each.evaluation.violation]
        if missing:
            x, y = _places(missing, axes3)
            axes.scatter(
                x, y, s=26, marker="x", color=MUTED, linewidth=1, label="misses a floor",
                rasterized=len(missing) > MANY, zorder=2,
            )  # fmt: skip
        if feasible:
            x, y = _places(feasible, axes3)
            colours = (
                [each.result(axes3.third.metric) for each in feasible] if axes3.third else SAFE
            )
            dots = axes.scatter(
                x, y, s=30, c=colours, cmap=SCALE if axes3.third else None, edgecolor=MUTED,
                linewidth=0.5, label="candidate", rasterized=len(feasible) > MANY, zorder=3,
            )  # fmt: skip
            if axes3.third:
                axes.figure.colorbar(dots, ax=axes, label=axes3.third.label, pad=0.02)
        titles = {}
        if best_ones:
            axes.plot(*_places(best_ones, axes3), "-", color=SAFE, linewidth=1.4, label="front")
        for each in best_ones[:100]:
            x, y = _places([each], axes3)
            (mark,) = axes.plot(
                x, y, "o", color=SAFE, markersize=9, markerfacecolor="none", zorder=4
            )
            mark.set_gid(f"mark-{each.number}")
            titles[f"mark-{each.number}"] = _told(each, axes3)
        (mark,) = axes.plot(
            *_places([best], axes3),
            "*",
            color=CHOSEN,
            markersize=15,
            zorder=5,
            label="the chosen one",
        )
        mark.set_gid("mark-best")
        titles["mark-best"] = f"The chosen one. {_told(best, axes3)}"
        axes.set(xlabel=axes3.skill.label, ylabel=axes3.alignment.label)
        axes.margins(0.08)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0.2)
        return titles

    return Figure(f"{key}-tradeoff", "Trade-off of the candidates", alt, draw, 4.6)


def _progress(study: StudyRecord, key: str) -> Figure | None:
    best = study.best
    if best is None:
        return None
    scored = [each for each in study.candidates if each.evaluation.values is not None]
    failed = [each for each in study.candidates if each.evaluation.values is None]
    missing = [each for each in scored if each.evaluation.violation]
    steps = _record(study.candidates)
    begin = f" from {steps[0][1]:.4g}" if steps else ""
    alt = (
        f"Fitness of {len(study.candidates)} evaluations in their order: the best one rises{begin} "
        f"to {best.fitness:.4g} at evaluation {best.number}. {len(missing)} miss a floor, "
        f"{len(failed)} failed."
    )

    def draw(axes: Axes) -> Titles:
        feasible = [each for each in scored if not each.evaluation.violation]
        for group, marker, colour, label in (
            (feasible, "o", SAFE, "candidate"),
            (missing, "x", MUTED, "misses a floor"),
        ):
            if group:
                axes.plot(
                    [each.number for each in group], [each.fitness for each in group], marker,
                    color=colour, markersize=4, label=label, rasterized=len(group) > MANY,
                )  # fmt: skip
        if failed:
            axes.plot(
                [each.number for each in failed], [0.01] * len(failed), "|", color=REFUSED,
                markersize=9, label="failed", transform=axes.get_xaxis_transform(),
            )  # fmt: skip
        if steps:
            numbers, heights = zip(*[*steps, (len(study.candidates), steps[-1][1])], strict=True)
            axes.step(
                numbers, heights, where="post", color=CHOSEN, linewidth=1.6, label="best so far"
            )
        axes.set(xlabel="evaluation", ylabel="fitness (higher is better)")
        axes.locator_params(axis="x", integer=True)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, borderaxespad=0.2)
        return {}

    return Figure(f"{key}-progress", "Progress", alt, draw, 3.6)


_PLACE = re.compile(r"^(?P<parameter>[^ ]+) \((?P<where>.*)\)$")
_LAYERS = re.compile(r"(?:^|, )layers (\d+)-(\d+)(?=,|$)")


def _weights(study: StudyRecord, key: str) -> Figure | None:
    best = study.best
    if best is None:
        return None
    cells: dict[tuple[str, str], float] = {}
    for (name, *_), value in zip(study.genes, best.evaluation.genotype, strict=True):
        found = _PLACE.match(name)
        layers = _LAYERS.search(found["where"]) if found else None
        if found is None or layers is None:
            continue
        where = (found["where"][: layers.start()] + found["where"][layers.end() :]).strip(", ")
        row = where if found["parameter"] == "weight" else f"{found['parameter']}, {where}"
        first, last = layers.groups()
        cells[row, first if first == last else f"{first}–{last}"] = value
    if not cells:
        return None
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    grid = [[cells.get((row, column), math.nan) for column in columns] for row in rows]
    alt = (
        f"Heat map of the chosen candidate's weights, {len(rows)} rows by {len(columns)} groups of "
        f"layers, from {min(cells.values()):.3g} to {max(cells.values()):.3g}. The numbers are in the "
        "table of genes."
    )

    def draw(axes: Axes) -> Titles:
        mesh = axes.pcolormesh(grid, cmap=SCALE, edgecolor="none", rasterized=len(cells) > MANY)
        axes.invert_yaxis()
        axes.grid(False)
        every = max(1, math.ceil(len(columns) / 12))
        axes.set_xticks([0.5 + i for i in range(0, len(columns), every)], columns[::every])
        axes.set_yticks([0.5 + i for i in range(len(rows))], [brief(row, 26) for row in rows])
        axes.set_xlabel("layers, from the embedding's side")
        if len(cells) <= 64 and len(columns) <= 8:
            for i, values in enumerate(grid):
                for j, value in enumerate(values):
                    dark = mesh.to_rgba(np.array([value]))[0, :3].sum() < 1.5
                    axes.text(
                        j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=9,
                        color="#ffffff" if dark else "#000000",
                    )  # fmt: skip
        axes.figure.colorbar(mesh, ax=axes, pad=0.02)
        return {}

    height = min(9.0, 1.6 + 0.32 * len(rows))
    return Figure(f"{key}-weights", "Weights by layer", alt, draw, height)


def _record(candidates: Sequence[Candidate]) -> list[tuple[int, float]]:
    """Where a feasible candidate was fitter than all before it."""
    steps: list[tuple[int, float]] = []
    for each in candidates:
        better = not steps or each.fitness > steps[-1][1]
        if each.evaluation.complete and not each.evaluation.violation and better:
            steps.append((each.number, each.fitness))
    return steps


def _places(group: Sequence[Candidate], axes: Axes3) -> tuple[list[float], list[float]]:
    return (
        [each.result(axes.skill.metric) for each in group],
        [each.result(axes.alignment.metric) for each in group],
    )


def _told(candidate: Candidate, axes: Axes3) -> str:
    shown = [axes.skill, axes.alignment, *([axes.third] if axes.third else [])]
    values = ", ".join(f"{each.label} {candidate.result(each.metric):.4g}" for each in shown)
    return visible(f"Evaluation {candidate.number}: {values}")


def _metric(key: str, known: Sequence[Metric]) -> Metric | None:
    """The metric that an objective names, `TASK:METRIC`."""
    task, _, metric = key.partition(":")
    return (task, metric) if metric else next((each for each in known if each[0] == task), None)
