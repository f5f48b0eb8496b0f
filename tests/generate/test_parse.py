"""Questions out of what a model wrote, and the letter that an answer chooses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mergekit_align.generate.parse import LETTERS, Parsed, Parser, chosen_letter


def questions(kind: str, text: str, *, cut: bool = False, pattern: str | None = None) -> list[str]:
    parser = Parser(kind=kind, pattern=pattern)  # type: ignore[arg-type]
    return [parsed.question for parsed in parser.parse(text, cut=cut)]


def test_lines_lose_their_numbers_bullets_and_quotes() -> None:
    text = '1. How is it?\n\n2) "Where is it?"\n- Who has it?\n* (3 of them)\nQ4: When?\n'
    found = ["How is it?", "Where is it?", "Who has it?", "(3 of them)", "When?"]
    assert questions("lines", text) == found


def test_a_number_that_is_part_of_the_question_stays() -> None:
    assert questions("lines", "3 birds sit on a wall. How many?") == [
        "3 birds sit on a wall. How many?"
    ]


def test_what_stands_around_a_list_is_no_question() -> None:
    text = "Sure, here are two questions:\n\n1. How is it?\n2. Where is it?\n\nI hope this helps!"
    assert questions("lines", text) == ["How is it?", "Where is it?"]


def test_what_was_cut_loses_the_question_that_did_not_end() -> None:
    assert questions("lines", "1. How is it?\n2. Where is", cut=True) == ["How is it?"]
    assert questions("whole", "Where is", cut=True) == []


def test_a_pattern_finds_its_group() -> None:
    found = questions("pattern", "<q>one</q> and <q>two</q>", pattern="<q>(?P<question>.*?)</q>")
    assert found == ["one", "two"]


@pytest.mark.parametrize("pattern", [None, "(", "(.*)"])
def test_a_pattern_must_be_one_with_the_group(pattern: str | None) -> None:
    with pytest.raises(ValidationError):
        Parser(kind="pattern", pattern=pattern)


class TestMultipleChoice:
    def parse(self, text: str, *, cut: bool = False) -> list[Parsed]:
        return Parser(kind="multiple_choice").parse(text, cut=cut)

    def test_a_question_with_its_choices(self) -> None:
        text = "Question: Which is it?\nOf these?\nA. one\nB) two\n(C) three\nD: four\nAnswer: B"
        assert self.parse(text) == [
            Parsed("Which is it? Of these?", ("one", "two", "three", "four"))
        ]

    def test_no_more_choices_than_there_are_letters(self) -> None:
        options = "".join(f"{letter}) {letter.lower()}\n" for letter in LETTERS)
        (parsed,) = self.parse(f"Which one?\n{options}A) another\n")
        assert len(parsed.choices) == len(LETTERS)

    def test_several_of_them(self) -> None:
        text = "1. First?\nA. a\nB. b\n\n2. Second?\nA. c\nB. d\nThe correct answer is A.\n"
        assert self.parse(text) == [Parsed("First?", ("a", "b")), Parsed("Second?", ("c", "d"))]
        assert self.parse(text, cut=True) == [Parsed("First?", ("a", "b"))]

    @pytest.mark.parametrize(
        "text",
        ["Which?", "Which?\nA. one", "A. one\nB. two", "Which?\nB. one\nA. two", "Q?\nA. x\nB. x"],
    )
    def test_what_is_none(self, text: str) -> None:
        assert self.parse(text) == []


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("b", None),
        ("A. the liver", "A"),
        ("A liver is an organ.", None),
        ("The answer is C.", "C"),
        ("The correct option is (B) because A is wrong.", "B"),
        ("Answer: D) copper", "D"),
        ("First I thought the answer is A, but the answer is B.", "B"),
        ("I do not know.", None),
        ("E", None),
        ("", None),
    ],
)
def test_the_letter_that_an_answer_chooses(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer, 4) == letter
