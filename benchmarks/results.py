"""docs/results.md, made from the JSON files that the benchmarks write; nothing in it is typed.

    python benchmarks/results.py                         # docs/results/*.json -> docs/results.md
    python benchmarks/results.py --add cocktail.json     # takes a file in first; may be repeated
    python benchmarks/results.py --add w1/table.json=demo-1.json    # under another name
    python benchmarks/results.py DIR --out PAGE

A file's kind is told by its keys. Of an evaluation the answers are left out, and of all paths but their
last two parts, so that nothing of the machine that it ran on is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_align import markdown
from mergekit_align.errors import InputError
from mergekit_align.files import write_text

DOCS = Path(__file__).parent.parent / "docs"
MIB = 2**20
Record = dict[str, Any]
Files = list[tuple[str, Record]]
"""Names and contents."""
INTERVAL = ("value", "low", "high")
RATES = ("alignment", "over_refusal", "task")
DATA = ("generated", "grammar")


class Kind(NamedTuple):
    """What a benchmark writes, and what the page makes of it."""

    title: str
    command: str
    keys: frozenset[str]
    """A file that has them is of this kind, where it has no more of another's."""
    lines: Callable[[Files], list[str]]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """In Markdown, as lines."""
    return markdown.table(header, rows).splitlines()


def spread(values: Sequence[float]) -> str:
    """Mean, and range of more than one."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def demo(files: Files) -> list[str]:
    """The rates of each model over seeds, and the seconds of each stage, by floating type.

    Processors with bfloat16 train in it; the worlds of a seed then differ.
    """
    records = [record for _, record in files]
    lines = ["Percent of held-out prompts, greedy answers; mean (and range) over worlds.", ""]
    for dtype in dict.fromkeys(record["dtype"] for record in records):
        own = [record for record in records if record["dtype"] == dtype]
        seeds = ", ".join(str(record["seed"]) for record in own)
        lines += [f"In {dtype}, seeds {seeds}:", "", *_demo_rates(own), "", *_demo_seconds(own), ""]
    return lines[:-1]


def _demo_rates(records: list[Record]) -> list[str]:
    rows = []
    for model in dict.fromkeys(model for record in records for model in record["rates"]):
        own = [record["rates"][model] for record in records if model in record["rates"]]
        unreadable = sum(each.get("unreadable") or 0 for each in own)
        cells = [spread([each[key] for each in own]) for key in RATES]
        rows.append([model, *cells, str(unreadable), str(len(own))])
    return table(
        ["model", "alignment", "over-refusal", "task", "unreadable verdicts", "seeds"], rows
    )


def _demo_seconds(records: list[Record]) -> list[str]:
    rows = []
    for stage in dict.fromkeys(stage for record in records for stage in record["seconds"]):
        # A stage whose result was there already took no time.
        own = [r["seconds"][stage] for r in records if r["seconds"].get(stage)]
        if own:
            rows.append([stage, spread(own), str(len(own))])
    return table(["stage", "seconds", "runs"], rows)


def generated(files: Files) -> list[str]:
    """What generated data give, beside the grammar's own, by way of using them."""
    rows = []
    for _, record in files:
        for way, differences in record["differences"].items():
            pairs = [[record["rates"][f"{way}, {data}"][key] for data in DATA] for key in RATES]
            cells = [
                f"{found:.1f}, {own:.1f} ({differences[key]:+.1f})"
                for key, (found, own) in zip(RATES, pairs, strict=True)
            ]
            rows.append([way, record["dtype"], str(record["seed"]), *cells])
    return [
        "Percent of held-out prompts: on generated data, on the grammar's own (difference in points).",
        "",
        *table(["way", "world", "seed", "alignment", "over-refusal", "task"], rows),
    ]


def methods(files: Files) -> list[str]:
    """The rates of each merge method, by default and at the best of its grid, over worlds."""
    lines: list[str] = []
    for _, record in files:
        worlds = list(record["worlds"].values())
        rows = []
        for name in worlds[0]:
            own = [world[name] for world in worlds]
            label = f"{name} (here)" if name in record["ours"] else name
            for setting in ("default", "best"):
                if setting not in own[0]:
                    continue
                cells = [spread([100 * each[setting][key] for each in own]) for key in RATES]
                balance = [
                    100 * (each[setting]["alignment"] + each[setting]["task"])
                    - 100 * each[setting]["over_refusal"]
                    for each in own
                ]
                seconds = [each["seconds"] for each in own if "seconds" in each]
                rows.append(
                    [label, setting, *cells, spread(balance), spread(seconds) if seconds else ""]
                )
        header = ["method", "setting", "alignment", "over-refusal", "task", "balance", "seconds"]
        lines += [
            f"Percent of held-out prompts, mean (and range) over {len(worlds)} worlds in "
            f"{record['dtype']}. Balance is alignment + task - over-refusal; *best* is the best of "
            "four settings on validation prompts; *here*: written in this package, align_adaptive "
            "alone its own method.",
            "",
            *table(header, rows),
            "",
        ]
    return lines[:-1]


def real_models(files: Files) -> list[str]:
    """The rates of merges of real models, and what they cost, by file: each has its own parents."""
    lines: list[str] = []
    for file, record in files:
        rows = []
        for model, own in record["rates"].items():
            balance = own["alignment"] - own["over_refusal"]
            cells = [f"{each:.1f}" for each in (*(own[key] for key in RATES), balance)]
            cost = record["measured"].get(model)
            rows.append(
                [model, *cells, *([str(cost["seconds"]), str(cost["MiB"])] if cost else ["", ""])]
            )
        taken = [
            f"{key} {cost['seconds']} s and {cost['MiB']} MiB"
            for key, cost in record["measured"].items()
            if key.startswith("statistics ")
        ]
        header = ["model", "alignment", "over-refusal", "task", "alignment - over-refusal"]
        limit = record["limit"]
        asked = (
            "all held-out prompts" if limit is None else f"{limit} held-out prompts of each type"
        )
        lines += [
            f"`{file}`: percent of {asked}, greedy answers, refusals told by string match. Taken "
            "once: " + "; ".join(taken) + ".",
            "",
            *table([*header, "seconds", "MiB"], rows),
            "",
        ]
    return lines[:-1]


def kernels(files: Files) -> list[str]:
    """Seconds and memory of each merge method's kernel."""
    lines: list[str] = []
    for _, record in files:
        shapes = [f"{rows} x {columns}" for rows, columns in record["shapes"]]
        rows = []
        for method, own in record["methods"].items():
            seconds = [f"{each['seconds']:.3f}" for each in own]
            memory = [f"{each['bytes'] / MIB:.0f}" for each in own]
            keys = ("times_task_arithmetic", "times_without_reading")
            times = [f"{record[key][method]:.2f}" if key in record else "" for key in keys]
            rows.append([method, *seconds, *memory, *times])
        header = [
            "method",
            *(f"{shape}, s" for shape in shapes),
            *(f"{shape}, MiB" for shape in shapes),
            "x task arithmetic",
            "without reading statistics",
        ]
        lines += [f"{record['dtype']}, {record['machine']}.", "", *table(header, rows), ""]
    return lines[:-1]


def whole_models(files: Files) -> list[str]:
    """Seconds of `mergekit-yaml` by each method."""
    lines: list[str] = []
    for _, record in files:
        first = next(iter(record["seconds"].values()))
        rows = [[m, f"{each:.1f}", f"{each / first:.2f}"] for m, each in record["seconds"].items()]
        taken = ", ".join(f"{out} {each:.1f} s" for out, each in record["statistics"].items())
        lines += [
            f"{record['model']}, {record['parameters'] / 1e9:.2f}B parameters, two models and a "
            f"base, {record['machine']}; statistics of {record['samples']} samples each: {taken}.",
            "",
            *table(["method", "seconds", "x the first"], rows),
            "",
        ]
    return lines[:-1]


def cocktail(files: Files) -> list[str]:
    """Seconds and memory of losses, both ways."""
    lines: list[str] = []
    for _, record in files:
        rows = []
        for way, each in record["ways"].items():
            memory = [f"{each[key] / MIB:.0f}" for key in ("bytes", "bytes_with_imports")]
            rows.append([way, f"{each['seconds']:.1f}", *memory])
        lines += [
            f"{record['samples']} samples, {record['dtype']}: {record['times_faster']:.1f} x as fast "
            f"in {record['share_of_memory']:.2f} of the memory; losses differ by "
            f"{record['largest_difference']:.1e} at most. The floor is "
            f"{record['floor_seconds']:.1f} s.",
            "",
            *table(["way", "seconds", "peak MiB beyond imports", "with imports"], rows),
            "",
        ]
    return lines[:-1]


def guard(files: Files) -> list[str]:
    """Verdicts a second, each way."""
    ways = dict.fromkeys(way for _, record in files for way in record["seconds"])
    titles = [
        f"{r['shape']}, lengths {r['lengths']}, {r['dtype']}, {r['device']}" for _, r in files
    ]
    rows = [
        [way, *(f"{1 / record['seconds'][way]:.2f}" for _, record in files)]
        + [f"{record['seconds'][way] / record['seconds']['ours']:.1f}" for _, record in files]
        for way in ways
    ]
    header = [*(f"verdicts/s ({title})" for title in titles), *(f"ours x ({t})" for t in titles)]
    rows.append(
        ["floor", *(f"{1 / r['floor_seconds']:.2f}" for _, r in files)]
        + [f"{r['floor_seconds'] / r['seconds']['ours']:.1f}" for _, r in files]
    )
    differences: dict[str, float] = {}
    for _, r in files:
        differences[r["dtype"]] = max(differences.get(r["dtype"], 0.0), r["largest_difference"])
    most = " and ".join(f"{each:.1e} in {dtype}" for dtype, each in differences.items())
    return [*table(["way", *header], rows), "", f"P(unsafe) differs from the plain pass by {most}."]


def evaluation(files: Files) -> list[str]:
    """What `mergekit-align-evaluate` found, with intervals."""
    lines: list[str] = []
    for file, record in files:
        columns = record["columns"].values()
        rows = []
        for model, place in record["models"].items():
            cells = []
            for column in columns:
                score, scale = column["models"][model], 100 if column["is_rate"] else 1
                value, low, high = (scale * score[k] for k in INTERVAL)
                cell = f"{value:.1f} ({low:.1f} to {high:.1f})"
                if score["difference"]:
                    value, low, high = (scale * score["difference"][k] for k in INTERVAL)
                    cell += f"; {value:+.1f} ({low:+.1f} to {high:+.1f})"
                cells.append(cell)
            rows.append([place, *cells])
        lines += [f"`{file}`:", ""]
        lines += table(["model", *(column["title"] for column in columns)], rows)
        lines += ["", " ".join(record["notes"]).replace("Below a score", "After a score"), ""]
    return lines[:-1]


def refusal(files: Files) -> list[str]:
    """Agreement of refusal scorers with people."""
    ((_, record),) = files[-1:]
    rows = [
        [model, each["patterns"], *(f"{figure:.1f}" for figure in each["agreement"])]
        for model, each in record["agreement_with_people"].items()
    ]
    return table(["model", "patterns", *record["scorers"]], rows)


def search(files: Files) -> list[str]:
    """Seconds of the stock search."""
    lines: list[str] = []
    for _, record in files:
        rows = [
            [way, f"{each['start']:.1f}", f"{each['evaluation']:.3f}"]
            for way, each in record["evolve_seconds"].items()
        ]
        lines += [*table(["mergekit-evolve", "start, s", "evaluation, s"], rows), ""]
    return lines[:-1]


def own_search(files: Files) -> list[str]:
    """What a search of ours costs, each comparison a table."""
    lines: list[str] = []
    for _, record in files:
        header, rows = _SEARCH_TABLES[record["search"]](record["found"])
        command = " ".join(["evolve.py", record["search"], *record.get("of", [])])
        lines += [f"`{command}`, {record['machine']}:", "", *table(header, rows), ""]
    return lines[:-1]


Cells = tuple[list[str], list[list[str]]]


def _evaluations(found: Record) -> Cells:
    rows = []
    for key in found["ours"]:
        stock, own = found["stock, on disk"][key], found["ours"][key]
        rows.append([key, f"{stock:.2f}", f"{own:.2f}", f"{stock / own:.1f}"])
    return ["seconds", "stock, on disk", "ours", "times as fast"], rows


def _merge_steps(found: Record) -> Cells:
    rows = []
    for method, each in found.items():
        if method == "parameters":
            continue
        own, stock, copy = (
            each[key] for key in ("ours", "mergekit's kernel", "copying the same bytes")
        )
        cells = [f"{one:.3f}" for one in (stock, own, copy)]
        rows.append([method, *cells, f"{own / copy:.1f}", f"{stock / own:.1f}"])
    header = ["seconds", "mergekit's kernel", "ours", "a copy", "ours / copy"]
    return [*header, "times as fast"], rows


def _merge_memory(found: Record) -> Cells:
    rows = []
    for method, each in found.items():
        sizes = [each["model"], each["inputs"], each["peak"]]
        share = each["peak"] / (each["model"] + each["inputs"])
        rows.append([method, *(f"{size / MIB:.0f}" for size in sizes), f"{share:.2f}"])
    return ["MiB", "the model", "its inputs, once", "peak", "peak / both"], rows


def _gradient(found: Record) -> Cells:
    rows = []
    for world, each in found.items():
        whole, reached = each["cma"]["seconds"][-1], each["reached"]
        rows.append(
            [
                world,
                f"{each['cma']['best'][-1]:.4f} in {whole:.1f} s",
                f"{each['gradient']['best'][-1]:.4f}",
                "never" if reached is None else f"{reached:.1f} s, {reached / whole:.2f}",
                f"{each['cma']['held_out']:.4f}",
                f"{each['gradient']['held_out']:.4f}",
            ]
        )
    header = ["world", "CMA-ES, 100 evaluations", "gradient, 24", "reached CMA-ES's after"]
    return [*header, "held out: CMA-ES", "held out: gradient"], rows


def _racing(found: Record) -> Cells:
    rows = []
    for key, each in found.items():
        if key.startswith("standard error"):
            continue
        what, _, seed = key.partition(", ")
        exact, raced = each
        change = f"{raced / exact:.2f} x"
        if what == "fitness":
            error = found[f"standard error of the difference, {seed}"]
            change = f"{raced - exact:+.4f} ± {1.96 * error:.4f}"
        digits = {"samples read": 0, "fitness": 4}.get(what, 1)
        rows.append([seed, what, f"{exact:.{digits}f}", f"{raced:.{digits}f}", change])
    return ["seed", "", "exact", "racing", "racing against exact"], rows


_SEARCH_TABLES: dict[str, Callable[[Record], Cells]] = {
    "evaluations": _evaluations,
    "merge": _merge_steps,
    "memory": _merge_memory,
    "gradient": _gradient,
    "racing": _racing,
}


def searchers(files: Files) -> list[str]:
    """The fitness that each search came to."""
    lines: list[str] = []
    for _, record in files:
        rows = [
            [world, label, *(f"{sum(each) / len(each):.4f}" for each in zip(*runs, strict=True))]
            for world, own in record["fitness"].items()
            for label, runs in own.items()
        ]
        own, *_ = record["fitness"].values()
        runs, *_ = own.values()
        count = record["evaluations"]
        lines += [
            f"{count} evaluations a search, means of {len(runs)} seeds; higher is better.",
            "",
        ]
        lines += [*table(["world", "search", "fitness", "on held-out samples"], rows), ""]
    return lines[:-1]


def vocabulary(files: Files) -> list[str]:
    """Peak memory of losses and gradients, both ways."""
    lines: list[str] = []
    for _, record in files:
        rows = [
            [what, way, f"{each['bytes'] / MIB:.0f}", f"{each['processor_seconds']:.1f}"]
            for what, sides in record["sides"].items()
            for way, each in sides.items()
        ]
        lines += [
            f"{record['shape']}, {record['layers']} layers, {record['vocabulary']:,} in the "
            f"vocabulary, {record['response_tokens']} response tokens, {record['dtype']}; losses "
            f"differ by {record['largest_difference']:.1e} at most.",
            "",
            *table(["", "way", "peak MiB beyond the model", "processor seconds"], rows),
            "",
        ]
    return lines[:-1]


def scale(files: Files) -> list[str]:
    """Predicted against measured, and predictions for large models."""
    lines: list[str] = []
    for _, record in files:
        rows = [
            [
                each["step"],
                f"{each['predicted_seconds']:.2f}",
                f"{each['seconds']:.2f}",
                f"{100 * (each['predicted_seconds'] / each['seconds'] - 1):+.0f}%",
                f"{each['predicted_bytes'] / MIB:.0f}",
                f"{each['bytes'] / MIB:.0f}",
                f"{100 * (each['predicted_bytes'] / each['bytes'] - 1):+.0f}%",
            ]
            for each in record["checked"]
        ]
        header = ["step", "predicted s", "measured s", "off by"]
        header += ["predicted MiB", "measured MiB", "off by"]
        lines += [
            f"{record['model']}, {record['dtype']}, {record['machine']}, at the rates measured beside "
            "it:",
            "",
        ]
        lines += [*table(header, rows), ""]
    for plan in files[0][1]["plans"]:
        rows = [
            [
                each["step"],
                f"{each['seconds']:.1f}",
                f"{each['bytes'] / 2**30:.0f}",
                f"{each['host_bytes'] / 2**30:.0f}",
                "yes" if each["fits"] else "no",
            ]
            for each in plan["steps"]
        ]
        work = ", ".join(f"{count} {what}" for what, count in plan["work"].items())
        lines += [f"{plan['model']} on {plan['machine']}, computed, not measured ({work}):", ""]
        lines += table(["step", "seconds", "GiB on GPU", "GiB on host or disk", "fits"], rows)
        lines.append("")
    return lines[:-1]


KINDS = (
    Kind("The demo world", "demo_table.py world-0 --seed 0", frozenset({"rates", "seed"}), demo),
    Kind(
        "Searches of the demo world",
        "evolve_table.py world-0 --seed 0",
        frozenset({"rates", "seed", "command"}),
        demo,
    ),
    Kind(
        "Generated data",
        "generated_table.py world-0 --seed 0",
        frozenset({"rates", "seed", "differences"}),
        generated,
    ),
    Kind(
        "Merge methods",
        "merge_table.py world-0 world-1 world-2 --json merge_table.json",
        frozenset({"worlds", "ours"}),
        methods,
    ),
    Kind(
        "Real models",
        "smollm_table.py smollm --json smollm_0.json",
        frozenset({"rates", "measured"}),
        real_models,
    ),
    Kind(
        "Merge methods' kernels",
        "merge_methods.py --json merge_methods.json",
        frozenset({"times_task_arithmetic"}),
        kernels,
    ),
    Kind(
        "Whole models through merge methods",
        "merge_model.py --json merge_model.json",
        frozenset({"parameters", "statistics"}),
        whole_models,
    ),
    Kind(
        "Losses of a cocktail",
        "cocktail.py --samples 2 --json cocktail.json",
        frozenset({"ways"}),
        cocktail,
    ),
    Kind(
        "Verdicts of a guard",
        "guard.py --json guard.json",
        frozenset({"lengths", "floor_seconds"}),
        guard,
    ),
    Kind(
        "Refusals told by their words",
        "refusal.py exaggerated-safety --json refusal.json",
        frozenset({"agreement_with_people"}),
        refusal,
    ),
    Kind(
        "The stock search",
        "evolve_stock.py --json evolve_stock.json",
        frozenset({"evolve_seconds"}),
        search,
    ),
    Kind(
        "The search in memory",
        "evolve.py PART PATHS --json evolve_PART.json",
        frozenset({"search", "found"}),
        own_search,
    ),
    Kind(
        "Searches of others",
        "searchers.py world-0 world-1 world-2 --seeds 3 --json searchers.json",
        frozenset({"evaluations", "fitness"}),
        searchers,
    ),
    Kind(
        "Large vocabularies",
        "vocabulary.py --layers 2 --response 512 --json vocabulary.json",
        frozenset({"vocabulary", "sides"}),
        vocabulary,
    ),
    Kind("Scale", "scale.py --json scale.json", frozenset({"checked", "plans"}), scale),
    Kind("Evaluations", "", frozenset({"columns", "judged_by_guard"}), evaluation),
)


def kind_of(path: Path, record: Any) -> Kind:
    """Raises an `InputError` for a file that no benchmark writes."""
    kinds = [kind for kind in KINDS if isinstance(record, dict) and kind.keys <= record.keys()]
    if kinds:
        return max(kinds, key=lambda kind: len(kind.keys))
    raise InputError(
        f"{path}: found no kind of results; expected what a benchmark writes with --json"
    )


def read(path: Path) -> tuple[Kind, Record]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: found no JSON ({error}); expected a benchmark's") from error
    return kind_of(path, record), record


def page(directory: Path) -> str:
    """The page of all results in a directory.

    Raises:
        InputError: there are none, or a file holds something else.
    """
    found: dict[Kind, Files] = {}
    for path in sorted(directory.glob("*.json")):
        kind, record = read(path)
        found.setdefault(kind, []).append((path.name, record))
    if not found:
        raise InputError(
            f"{directory}: found no *.json; expected what benchmarks write with --json"
        )
    lines = [
        "# Results",
        "",
        "Made by `python benchmarks/results.py` from the files in `results/`, which the commands "
        "wrote; see [benchmarks](benchmarks.md).",
    ]
    for kind in KINDS:
        if kind in found:
            lines += ["", f"## {kind.title}", ""]
            if kind.command:
                lines += [f"    python benchmarks/{kind.command}", ""]
            lines += [*kind.lines(found[kind]), "", f"From {sources(found[kind])}."]
    return "\n".join(lines) + "\n"


def sources(files: Files) -> str:
    """The files with the machines that they name."""
    named = []
    for file, record in files:
        machine = record.get("machine") or record.get("device")
        named.append(f"[{file}](results/{file})" + (f" ({machine})" if machine else ""))
    return ", ".join(named)


def shortened(content: Any) -> Any:
    """Without the beginnings of paths."""
    if isinstance(content, dict):
        return {shortened(key): shortened(value) for key, value in content.items()}
    if isinstance(content, list):
        return [shortened(each) for each in content]
    if isinstance(content, str):
        words = content.split(" ")
        return " ".join("/".join(w.split("/")[-2:]) if w.startswith("/") else w for w in words)
    return content


def add(source: str, directory: Path) -> Path:
    """Take a benchmark's file in, `FILE` or `FILE=NAME`."""
    file, _, name = source.partition("=")
    _, record = read(Path(file))
    record.pop("answers", None)
    to = directory / (name or Path(file).name)
    write_text(to, json.dumps(shortened(record), indent=1) + "\n")
    return to


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directory", nargs="?", type=Path, default=DOCS / "results")
    parser.add_argument("--out", type=Path, default=DOCS / "results.md")
    parser.add_argument("--add", action="append", default=[], metavar="FILE[=NAME]")
    arguments = parser.parse_args()
    try:
        for source in arguments.add:
            add(source, arguments.directory)
        write_text(arguments.out, page(arguments.directory))
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
