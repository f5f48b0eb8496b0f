"""The trade-off of an evaluation: what is gained in skill against what is lost in alignment."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from mergekit_align.evaluate import Evaluation, Score
from mergekit_align.report.figures import (
    CHOSEN,
    INK,
    MUTED,
    PAPER,
    REFUSED,
    SAFE,
    Figure,
    Titles,
    place_labels,
)
from mergekit_align.report.text import brief, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Point(NamedTuple):
    """A model in the picture; what is a rate is in percent."""

    model: str
    skill: Score
    alignment: Score
    over_refusal: Score | None
    on_front: bool
    """Whether no other model is at least as good in everything and better in something."""


def skill_column(evaluation: Evaluation) -> str | None:
    """The column that is set against alignment: the samples' task, or else the first lm-eval task."""
    others = [name for name in evaluation.columns if name not in ("alignment", "over_refusal")]
    return others[0] if others else None


def points(evaluation: Evaluation, skill: str) -> list[Point]:
    """The models whose alignment and skill are known."""
    columns = evaluation.columns

    def of(name: str, model: str) -> Score:
        score = columns[name].scores[model]
        scale = 100 if columns[name].is_rate else 1
        return score._replace(
            value=scale * score.value, low=scale * score.low, high=scale * score.high
        )

    found = []
    for model in evaluation.models:
        refused = of("over_refusal", model) if "over_refusal" in columns else None
        point = Point(model, of(skill, model), of("alignment", model), refused, False)
        if not any(math.isnan(value) for value in _worth(point)):
            found.append(point)
    return [
        each._replace(on_front=not any(_dominates(other, each) for other in found))
        for each in found
    ]


def trade_off(evaluation: Evaluation, skill: str, chosen: str | None, key: str) -> Figure | None:
    """Alignment and over-refusal against skill, a model a pair of marks; `None` without any."""
    if "alignment" not in evaluation.columns:
        return None
    found = points(evaluation, skill)
    if not found:
        return None
    column = evaluation.columns[skill]
    unit = " %" if column.is_rate else ""
    front = ", ".join(visible(each.model) for each in found if each.on_front)
    alt = (
        f"Scatter plot of {len(found)} models. Across: {column.title}{unit}. Up: unsafe prompts "
        f"answered safely, and harmless prompts refused, in percent. No other model beats {front}. "
        "The numbers are in the table below."
    )

    def draw(axes: Axes) -> Titles:
        return _draw(axes, found, f"{brief(column.title, 60)}{unit}", column.is_rate, chosen)

    return Figure(f"{key}-tradeoff", "Trade-off", alt, draw, 4.6)


def _draw(axes: Axes, found: list[Point], xlabel: str, is_rate: bool, chosen: str | None) -> Titles:
    titles = {}
    for index, each in enumerate(found):
        colour = CHOSEN if each.model == chosen else SAFE
        x, y = each.skill.value, each.alignment.value
        axes.errorbar(
            x, y, yerr=_arms(each.alignment), xerr=_arms(each.skill), fmt="none",
            ecolor=colour, elinewidth=1.2, zorder=3,
        )  # fmt: skip
        (mark,) = axes.plot(
            x, y, "*" if each.model == chosen else "o", color=colour,
            markersize=14 if each.model == chosen else 8,
            markerfacecolor=colour if each.on_front else PAPER, markeredgewidth=1.6, zorder=5,
        )  # fmt: skip
        mark.set_gid(f"mark-{index}-safe")
        titles[f"mark-{index}-safe"] = _told(each, "answered safely", each.alignment)
        if each.over_refusal is not None and not math.isnan(each.over_refusal.value):
            low = each.over_refusal
            axes.errorbar(
                x, low.value, yerr=_arms(low), fmt="none", ecolor=REFUSED, elinewidth=1.2, zorder=3
            )
            # Above the other mark, which lies in the same place where a model refuses everything.
            (mark,) = axes.plot(
                x, low.value, "v", color=REFUSED, markersize=7, markeredgecolor=PAPER,
                markeredgewidth=0.7, zorder=6,
            )  # fmt: skip
            mark.set_gid(f"mark-{index}-refused")
            titles[f"mark-{index}-refused"] = _told(each, "harmless ones refused", low)
            axes.plot([x, x], [low.value, y], ":", color=MUTED, linewidth=1, zorder=2)
    _legend(axes, found, chosen)
    axes.set(ylim=(-4, 104), xlabel=xlabel, ylabel="% of prompts")
    if is_rate:
        axes.set_xlim(-4, 104)
    else:
        axes.margins(x=0.15)
    place_labels(
        axes,
        [
            (e.skill.value, e.alignment.value, brief(e.model), CHOSEN if e.model == chosen else INK)
            for e in found
        ],
        [mark for each in found for mark in _extents(each)],
    )
    return titles


def _legend(axes: Axes, found: list[Point], chosen: str | None) -> None:
    entries = []
    if any(each.on_front for each in found):
        entries.append(("o", SAFE, SAFE, "answered safely; on the front"))
    if any(not each.on_front for each in found):
        entries.append(("o", SAFE, PAPER, "answered safely; beaten by another model"))
    if any(each.over_refusal is not None for each in found):
        entries.append(("v", REFUSED, REFUSED, "harmless prompts refused (low is good)"))
    if any(each.model == chosen for each in found):
        entries.append(("*", CHOSEN, CHOSEN, "the chosen one"))
    for marker, colour, face, text in entries:
        axes.plot(
            [],
            [],
            marker,
            color=colour,
            markerfacecolor=face,
            markeredgewidth=1.6,
            label=text,
            markersize=11 if marker == "*" else 7,
        )
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=1, borderaxespad=0.2)


def _told(point: Point, what: str, score: Score) -> str:
    return (
        f"{visible(point.model)}: {score.value:.1f} % {what} [{score.low:.1f}, {score.high:.1f}], "
        f"skill {point.skill.value:.4g}"
    )


def _extents(point: Point) -> list[tuple[float, float, float, float]]:
    """What is drawn of a model: least and greatest x, least and greatest y of each mark and bar."""
    found = []
    x = point.skill.value
    for score in (point.alignment, point.over_refusal):
        if score is not None and not math.isnan(score.value):
            found.append((x, x, score.value, score.value))
            found.append((x, x, *_ends(score)))
    return [*found, (*_ends(point.skill), point.alignment.value, point.alignment.value)]


def _ends(score: Score) -> tuple[float, float]:
    known = not math.isnan(score.low) and not math.isnan(score.high)
    return (score.low, score.high) if known else (score.value, score.value)


def _arms(score: Score) -> list[list[float]] | None:
    if math.isnan(score.low) or math.isnan(score.high):
        return None
    return [[max(0.0, score.value - score.low)], [max(0.0, score.high - score.value)]]


def _worth(point: Point) -> tuple[float, ...]:
    """What is to be high."""
    refused = 0.0 if point.over_refusal is None else point.over_refusal.value
    return point.skill.value, point.alignment.value, -refused


def _dominates(one: Point, other: Point) -> bool:
    pairs = list(zip(_worth(one), _worth(other), strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
