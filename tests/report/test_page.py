"""The page: what others wrote is shown and does nothing, numbers are right, nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from report_inputs import HELP, REFUSAL, make_evaluation, write_study_to

from mergekit_align.evaluate import save
from mergekit_align.evaluate.scores import wilson
from mergekit_align.report import write_report
from mergekit_align.report.text import MAX_SHOWN, shown, visible

SCRIPT = "<script>document.title = 'taken'</script>"
TAG = "\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
CONTROL = "a\x00b\x1b[31mc\u202ed\uffffe"
LONG = "x<b>" * 250_000


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and the text in each."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[list[str], str]] = []
        self._open: list[tuple[str, str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self._open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(([name for _, name in self._open], data))

    def under(self, name: str) -> list[str]:
        return [
            text for classes, text in self.texts if any(name in each.split() for each in classes)
        ]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    here = tmp_path_factory.mktemp("hostile")
    evaluation = make_evaluation(
        {
            SCRIPT: [TAG, CONTROL, LONG, SCRIPT, TAG, CONTROL, LONG, SCRIPT],
            f"$x_1$ {TAG}": [REFUSAL] * 8,
            CONTROL: [HELP] * 6 + ["blue"] * 2,
        },
        prompts=[SCRIPT, TAG, CONTROL, LONG, SCRIPT, TAG, CONTROL, LONG],
    )
    evaluation.notes.append(SCRIPT)
    study = write_study_to(here / "study.journal", genome={"base_model": SCRIPT})
    written = save(evaluation, here / "evaluation")[0].read_text(encoding="utf-8")
    file = here / "hostile.json"
    # Half of a surrogate pair: JSON can say it, UTF-8 cannot.
    file.write_text(written.replace("\uffff", "\\ud800"), encoding="utf-8")
    return write_report([file, study], output=here / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page on an evaluation and two searches."""
    here = tmp_path_factory.mktemp("page")
    inputs = [
        save(make_evaluation(), here / "evaluation")[0],
        write_study_to(here / "a.journal"),
        write_study_to(here / "b.journal"),
    ]
    return write_report(inputs, output=here / "page.html").read_text(encoding="utf-8")


class TestHostileText:
    def test_is_text(self, hostile: str) -> None:
        page = Page(hostile)
        names = [name for name, _ in page.elements]
        assert names.count("script") == 1
        assert "img" not in names
        attributes = {key for _, found in page.elements for key in found}
        assert not [key for key in attributes if key.startswith("on")]
        shown_texts = page.under("text")
        assert SCRIPT in shown_texts
        assert TAG in shown_texts
        assert "a␀b␛[31mc⟨U+202E⟩d⟨U+D800⟩e" in shown_texts

    def test_has_no_control_characters_anywhere(self, hostile: str) -> None:
        assert not re.findall("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\u202a-\u202e]", hostile)

    def test_is_cut_with_its_length_said(self, hostile: str) -> None:
        page = Page(hostile)
        assert LONG[:MAX_SHOWN] in page.under("text")
        assert f"Cut: the first {MAX_SHOWN:,} of {len(LONG):,} characters." in page.under("muted")
        assert len(hostile) < 400_000

    def test_in_figures_is_text(self, hostile: str) -> None:
        drawings = re.findall(r"<svg.*?</svg>", hostile, flags=re.DOTALL)
        assert len(drawings) == 4
        for drawing in drawings:
            ElementTree.fromstring(drawing)
        # No mathematics: the dollar signs are there.
        assert any("$x_1$" in text for text in Page(drawings[0]).under("mark"))


def test_the_policy_allows_the_pages_own_script_alone(source: str) -> None:
    script = re.search(r"<script>(.*?)</script>", source, flags=re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = next(a["content"] for n, a in Page(source).elements if "http-equiv" in a)
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_nothing_is_loaded_and_every_name_is_unique(source: str) -> None:
    page = Page(source)
    for _, attributes in page.elements:
        for key in ("src", "href", "xlink:href"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:image/png;base64,"))
    names = [found["id"] for _, found in page.elements if "id" in found]
    assert len(names) > 100
    assert len(names) == len(set(names))
    targets = {found["href"] for name, found in page.elements if name == "a"}
    assert {(target or "")[1:] for target in targets} <= set(names)


def test_the_table_has_the_evaluations_numbers(source: str) -> None:
    """3 of 4 unsafe prompts were answered safely, 2 of 2 task ones right."""
    row = re.search(r'<tr><th scope="row" data-sort="merged">.*?</tr>', source)
    assert row is not None
    cells = re.findall(r'<td data-sort="([^"]*)">([^<]*)', row[0])
    low, high = (round(100 * each, 1) for each in wilson(3, 4))
    assert cells[0] == ("0.75", f"75.0 [{low}, {high}]")
    assert cells[1] == ("0.0", "0")
    assert cells[3][0] == "1.0"
    unreadable = re.search(r'<tr><th scope="row" data-sort="expert">.*?</tr>', source)
    assert unreadable is not None
    assert '<td data-sort="1.0">1</td>' in unreadable[0]


def test_what_was_not_judged_safe_is_blurred(source: str) -> None:
    page = Page(source)
    blurred, every = page.under("unsafe"), page.under("text")
    assert REFUSAL not in blurred
    assert every.count(REFUSAL) > 4
    # Of the unsafe prompts' answers, 3 of expert's and 1 of merged's; an empty one has no text.
    assert blurred.count(HELP) == 4
    assert {"unsafe 0", "unsafe 1", "unsafe 2", "unsafe 3"} < set(blurred)
    assert not {"a?", "colour?"} & set(blurred)
    boxes = [found["id"] for _, found in page.elements if found.get("class") == "reveal"]
    labels = [found["for"] for name, found in page.elements if name == "label"]
    assert len(boxes) == 4
    assert boxes == labels


def test_figures_say_what_they_show(source: str) -> None:
    page = Page(source)
    alts = [found["aria-label"] or "" for name, found in page.elements if name == "svg"]
    assert alts[0].startswith("Scatter plot of 3 models.")
    # The weighted sums of the metrics, the best one -1 - 0.3 * 0.5 - 0.5 * 0.6.
    assert "rises from -2.5 to -1.45 at evaluation 2. 1 miss a floor, 1 failed." in alts[2]
    marks = [text for text in page.under("mark") if text.startswith("merged")]
    assert any("merged: 75.0 % answered safely" in text for text in marks)


class TestText:
    def test_what_can_be_seen_stays(self) -> None:
        text = "Grüße, 你好 👩‍🚀\n\tשלום"
        assert visible(text) == text
        assert shown(text).cut_from is None

    def test_every_character_below_the_blank_gets_a_sign(self) -> None:
        signs = visible("".join(map(chr, range(32))))
        assert len(signs) == 32
        assert {each for each in signs if ord(each) < 32} == {"\t", "\n"}
