"""The plugin gets in by itself, where mergekit is used and nowhere else, and costs next to nothing."""

from __future__ import annotations

import importlib.metadata
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from interpreter import python

STOCK_COMMANDS = sorted(
    script.name
    for script in importlib.metadata.entry_points(group="console_scripts")
    if script.value.startswith("mergekit.")
)
OURS = "print(sorted(name for name in sys.modules if name.startswith('mergekit_align')))"


def test_there_are_stock_commands_to_test() -> None:
    assert {"mergekit-evolve", "mergekit-yaml"} <= set(STOCK_COMMANDS)


@pytest.mark.slow
def test_help_of_every_stock_command_works() -> None:
    def run(command: str) -> subprocess.CompletedProcess[str]:
        script = Path(sys.executable).with_name(command)
        return subprocess.run([script, "--help"], capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(max_workers=2) as pool:
        for result in pool.map(run, STOCK_COMMANDS):
            assert result.returncode == 0, result.stderr
            assert "Usage" in result.stdout


def test_only_the_hook_is_imported_at_start() -> None:
    assert python(OURS) == "['mergekit_align', 'mergekit_align.autoload']"


def test_an_unrelated_programs_imports_trigger_nothing() -> None:
    assert python(f"import torch, transformers, mergekit; {OURS}") == (
        "['mergekit_align', 'mergekit_align.autoload']"
    )


def test_turned_off_nothing_of_ours_is_imported() -> None:
    off = {"MERGEKIT_ALIGN_NO_AUTOLOAD": "1"}
    assert python(f"import mergekit.merge_methods; {OURS}", **off) == "[]"


def test_using_mergekits_methods_loads_the_plugin() -> None:
    assert "mergekit_align.plugin" in python(f"import mergekit.merge_methods; {OURS}")


def test_register_does_the_same_any_number_of_times() -> None:
    code = (
        "import mergekit.merge_methods, mergekit_align; "
        "mergekit_align.register(); mergekit_align.register(); "
        f"import mergekit.card; print(mergekit.card.is_hf.__module__); {OURS}"
    )
    card, ours = python(code, MERGEKIT_ALIGN_NO_AUTOLOAD="1").splitlines()
    assert card == "mergekit_align.upstream_fixes"
    assert "mergekit_align.plugin" in ours


def test_an_interpreter_starts_less_than_2_ms_later() -> None:
    def start(**environment: str) -> float:
        before = time.perf_counter()
        # With bytecode, which pip writes when it installs a package.
        python("pass", PYTHONDONTWRITEBYTECODE="", **environment)
        return time.perf_counter() - before

    start()
    # In turns, so that whatever else the machine does falls on both; the median leaves out its bursts.
    pairs = [(start(), start(MERGEKIT_ALIGN_NO_AUTOLOAD="1")) for _ in range(40)]
    extra = statistics.median(on - off for on, off in pairs)
    assert extra < 0.002, f"{1000 * extra:.2f} ms"


def test_rays_workers_have_the_plugin(cluster: None) -> None:
    @ray.remote
    def registered() -> bool:
        import mergekit.merge_methods  # noqa: F401

        return "mergekit_align.plugin" in sys.modules

    assert ray.get(registered.remote())
