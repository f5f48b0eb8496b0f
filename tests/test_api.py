"""The package root gives a function for each command, loaded when it is asked for, and typed."""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from commands import OURS

import mergekit_align

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE = "THP_MEM_ALLOC_ENABLE"
FUNCTIONS = [name for name in mergekit_align.__all__ if name.islower() and name[0] != "_"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_name_is_a_documented_function(name: str) -> None:
    function = getattr(mergekit_align, name)
    assert callable(function)
    assert function.__doc__
    assert "return" in function.__annotations__


def test_all_is_what_there_is() -> None:
    listed = set(mergekit_align.__all__)
    assert set(mergekit_align._WHERE) == listed - {"__version__", "register"}
    assert listed <= set(dir(mergekit_align))
    with pytest.raises(AttributeError, match="no attribute 'evaluate_model'"):
        mergekit_align.evaluate_model  # type: ignore[attr-defined] # noqa: B018


def test_every_command_has_a_function_of_its_own_module() -> None:
    """That is: whichever module of `cli` a command is, `mergekit_align` has a name from its package."""
    packages = {where.partition(".")[0] for where, _ in mergekit_align._WHERE.values()}
    commands = {name.removeprefix("mergekit-align-") for name in OURS}
    assert {{"stats": "statistics"}.get(name, name) for name in commands} <= packages


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(),
    reason="this kernel gives none, or all have them",
)
@pytest.mark.parametrize("user", [None, "0"])
def test_memory_of_a_command_is_in_huge_pages_unless_the_user_says_no(user: str | None) -> None:
    program = (
        "import re, mergekit_align.cli.evolve, torch; tensor = torch.ones(2**24); "
        "found = re.findall(r'AnonHugePages: +(\\d+)', open('/proc/self/smaps').read()); "
        "print(sum(map(int, found)))"
    )
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    if user is not None:
        environment[VARIABLE] = user
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (int(told.stdout) >= 2**15) == (user is None)  # KiB, half of the tensor


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its allocator has no such option")
@pytest.mark.parametrize("user", [None, "131072"])
def test_a_command_keeps_the_memory_that_it_frees_unless_the_user_says_otherwise(
    user: str | None,
) -> None:
    program = (
        "import resource, mergekit_align.cli.evolve, torch\n"
        "for n in range(40):\n"
        "    if n == 20: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.ones(2**22)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    variable = "MALLOC_MMAP_THRESHOLD_"
    environment = {k: v for k, v in os.environ.items() if k != variable} | {VARIABLE: "0"}
    if user is not None:
        environment[variable] = user
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (int(told.stdout) < 20) == (user is None)  # pages that Linux cleared anew


def said_by(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_only_commands_set_up_their_process() -> None:
    threshold = "import gc, mergekit_align{}; print(gc.get_threshold()[0])"
    assert said_by(threshold.format("")) == said_by("import gc; print(gc.get_threshold()[0])")
    assert said_by(threshold.format(".cli.evolve")) == "10000"


def test_a_search_does_without_what_its_searcher_may_have() -> None:
    """`cma` asks for a part of scipy that it hardly uses, and takes half a second to import."""
    program = (
        "import sys, numpy as np, mergekit_align.evolve.searchers.cma as searcher\n"
        "from mergekit_align.evolve.searchers.base import Space\n"
        "from mergekit_align.evolve.genes import Gene\n"
        "searcher.CmaSearcher(Space([Gene(x, 0.0, 1.0, 0.5) for x in 'ab']), seed=0)\n"
        "print('scipy.stats' in sys.modules)\n"
        "import scipy.stats; print(scipy.stats.norm.cdf(0))"
    )
    assert said_by(program).split() == ["False", "0.5"]


def test_no_name_is_a_subpackages() -> None:
    """Importing `mergekit_align.evaluate` would put the package where the function was."""
    modules = {module.name for module in pkgutil.iter_modules(mergekit_align.__path__)}
    assert not modules & set(mergekit_align.__all__)
    for name in ("evaluate", "evolve"):
        importlib.import_module(f"mergekit_align.{name}")
    assert callable(mergekit_align.evaluate_models)


@pytest.mark.slow
def test_a_type_checker_knows_the_names(tmp_path: Path) -> None:
    """Each has a type of its own: neither unknown nor `Any`."""
    file = tmp_path / "uses.py"
    uses = "".join(f"reveal_type(mergekit_align.{name})\n" for name in FUNCTIONS)
    file.write_text(f"import mergekit_align\n{uses}mergekit_align.evaluate_model\n")
    result = subprocess.run(
        [sys.executable, "-m", "mypy", str(file)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    shown = [line for line in result.stdout.splitlines() if "Revealed type" in line]
    assert len(shown) == len(FUNCTIONS), result.stdout
    assert all('"def (' in line for line in shown), result.stdout
    assert 'Module has no attribute "evaluate_model"' in result.stdout
