"""What README and docs show is true: commands run or at least parse, configs fit, links resolve.

Commands of the pages in `SESSIONS` run, each page's in their order, in a folder that holds the examples
and a small demo world. Others name the reader's models, or work for hours: they are parsed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import torch
import yaml
from click.testing import CliRunner
from commands import OURS, ROOT, check_genome_file, command, lay_out
from documents import PAGES, Block, anchors, blocks
from lm_eval._cli import HarnessCLI
from lm_eval.tasks import TaskManager
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import merge_tensors

from mergekit_align.align_section import parse_align_section
from mergekit_align.cocktail.settings import CocktailSection
from mergekit_align.guard import load_profile
from mergekit_align.samples import load_samples
from mergekit_align.yaml_files import check_section, read_yaml_mapping

SESSIONS = [
    ROOT / "docs" / name
    for name in ("tutorial.md", "howto/safety_data.md", "howto/guard.md", "howto/resume.md")
]
ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(block, line) for block in ALL if block.language == "sh" for line in block.commands()]
# Before a command's own options, which win.
SMALLER = {
    "mergekit-align-demo": ["--scale", "smoke"],
    "mergekit-align-evolve": ["--evaluations", "3"],
}


def test_there_are_commands_and_configs() -> None:
    shown = {line.split()[0] for _, line in COMMANDS}
    assert {"mergekit-evolve", "mergekit-yaml", "lm_eval", "make"} <= shown
    ours = [name for name in shown if name.startswith("mergekit-align-")]
    assert len(ours) == 8
    assert {block.page for block in ALL if block.language == "yaml"} > set(SESSIONS[1:3])


@pytest.mark.parametrize(
    ("block", "line"), COMMANDS, ids=[f"{block}:{line[:40]}" for block, line in COMMANDS]
)
def test_a_command_parses(block: Block, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(line, comments=True)
    if program == "accelerate":
        assert arguments[:2] == ["launch", "-m"]
        name = arguments[2].rpartition(".")[2]
        program, arguments = f"mergekit-align-{name}", arguments[3:]
    if arguments == ["..."]:
        return
    if program.startswith("mergekit-"):
        command(program).make_context(program, arguments)
    elif program == "lm_eval":
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        HarnessCLI().parse_args()
    elif program == "ray":
        from ray.scripts.scripts import cli

        cli.make_context(program, arguments)
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python":
        if arguments[0] == "-m":
            assert importlib.util.find_spec(arguments[1])
        else:
            assert Path(arguments[0]).is_file()
    elif program == "pip":
        (what,) = arguments[1:]
        extra = re.fullmatch(r"(?:mergekit-align|\.)(?:\[(\w+)\])?", what)
        assert extra
        assert extra[1] is None or f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()
    else:
        assert program == "grep"


@pytest.mark.parametrize(
    "block",
    [block for block in ALL if block.language == "yaml" and "--8<--" not in block.text],
    ids=str,
)
def test_a_config_fits_its_schema(block: Block, tmp_path: Path) -> None:
    text = block.text.replace("PATH/TO", str(ROOT))
    file = tmp_path / "shown.yaml"
    file.write_text(text)
    plain = yaml.safe_load(text.replace("!function ", ""))
    if "class" in plain or "include" in plain:
        assert (
            plain["task"]
            in TaskManager(include_path=[str(tmp_path)], include_defaults=False).all_tasks
        )
        if "class" in plain:
            module, _, name = plain["class"].rpartition(".")
            assert hasattr(importlib.import_module(module), name)
        return
    content = read_yaml_mapping(file)
    if "genome" in content:
        own = [
            other for other in blocks(block.page) if other.title and other.title.endswith(".yaml")
        ]
        for other in own:
            (tmp_path / Path(other.title or "").name).write_text(other.text)
        check_genome_file(content, file, task_paths=[tmp_path])
    elif "merge_method" in content:
        MergeConfiguration.model_validate(content)
        if "align" in content:
            check_section(CocktailSection, content["align"], file)
    elif "verdicts" in text:
        load_profile(file)
    else:
        assert set(content) == {"align"}
        parse_align_section(content, file)


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "python"], ids=str)
def test_python_imports_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_merge_method_that_is_shown_merges(tmp_path: Path) -> None:
    """As its formula says: of an update along the alignment all, of one against it nothing."""
    page = ROOT / "docs" / "howto" / "merge_method.md"
    (shown,) = [block for block in blocks(page) if block.language == "python"]
    file = tmp_path / str(shown.title)
    file.write_text(shown.text)
    method = runpy.run_path(str(file))["nearest"]
    base, aligned = torch.zeros(2, 2), torch.eye(2)
    for update, taken in ((torch.eye(2), 1.0), (-torch.eye(2), 0.0)):
        merged = merge_tensors(
            [base, aligned, aligned + update],
            method,
            base_index=0,
            parameters={"role": ["aligned", "expert"], "weight": 0.5},
        )
        torch.testing.assert_close(merged, aligned + 0.5 * taken * update)


@pytest.mark.slow
@pytest.mark.parametrize("page", SESSIONS, ids=lambda page: page.stem)
def test_a_page_runs(
    page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command and every Python block of it, after the files that it has the reader write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lay_out(tmp_path, world, samples=4)
    for block in blocks(page):
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text)
        elif block.language == "python":
            Path("shown.py").write_text(block.text)
            runpy.run_path("shown.py")
        elif block.language == "sh":
            for line in block.commands():
                run(line, monkeypatch)
    for file in Path().glob("my_tasks/*.jsonl"):
        assert load_samples(file)


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "pip":
        return
    if program == "grep":
        subprocess.run(line, shell=True, check=True)
        return
    if program == "lm_eval":
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        cli = HarnessCLI()
        cli.execute(cli.parse_args())
        return
    result = CliRunner().invoke(command(program), [*SMALLER.get(program, []), *arguments])
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


def test_a_pages_links_lead_somewhere() -> None:
    """Those to files of the repository and to headings that are in the pages' own text."""
    checked = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith(("http://", "https://")):
                continue
            path, anchor = urldefrag(target)
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page}: {target}"
            # Headings that the site makes of docstrings, and those of included files, it checks itself.
            if anchor and "::: " not in file.read_text(encoding="utf-8"):
                assert anchor in anchors(file), f"{page}: {target}"
            checked += 1
    assert checked > 50


def test_pages_that_messages_name_are_there() -> None:
    named = set()
    for file in (ROOT / "mergekit_align").rglob("*.py"):
        named.update(re.findall(r'"(docs/[\w/]+\.md)#([\w-]+)"', file.read_text(encoding="utf-8")))
    assert len(named) == 3
    for page, anchor in named:
        assert anchor in anchors(ROOT / page)


class _Page(HTMLParser):
    """Where a page of the site can be entered, and where it leads to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.add(value or "")
            elif name in ("href", "src"):
                self.links.append(value or "")


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="what builds the site needs Python 3.11")
def test_the_site_builds_without_warnings_and_its_links_resolve() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No issues found" in result.stderr
    site = ROOT / "site"
    pages = {file: _Page(file.read_text("utf-8")) for file in site.rglob("*.html")}
    assert len(pages) > len(PAGES) - 3
    for file, page in pages.items():
        if file.name == "404.html":
            continue
        for link in page.links:
            path, anchor = urldefrag(unquote(link))
            if re.match("[a-z]+:", path):
                continue
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{file}: {link}"
            if anchor and target in pages:
                assert anchor in pages[target].ids, f"{file}: {link}"


def test_the_architecture_names_every_part() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for place in (ROOT / "mergekit_align").iterdir():
        if place.suffix == ".py" and place.name != "__init__.py":
            assert f"`{place.name}`" in text
        elif (place / "__init__.py").is_file():
            assert f"`{place.name}/`" in text


def test_every_command_has_its_help_on_the_site() -> None:
    shown = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name in OURS:
        assert f":prog_name: {name}\n" in shown


def test_every_example_is_on_the_site() -> None:
    shown = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for file in (ROOT / "examples").rglob("*.y*ml"):
        assert f'"{file.relative_to(ROOT)}"' in shown
