"""A guard's prompt as token ids, in which what is judged is text and nothing else.

The chat template is rendered once for each shape of conversation, around placeholders, so that no
content can steer it, and contents become no control tokens (`plain_text`). So a prompt's control
tokens are always those of the template, whatever a response says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from mergekit_align.errors import InputError
from mergekit_align.guard.conversation import Conversation
from mergekit_align.guard.plain_text import PlainText, encodable
from mergekit_align.guard.profile import GuardProfile, Reading
from mergekit_align.guard.template import GuardTemplate
from mergekit_align.guard.verdict import Meaning, VerdictTree
from mergekit_align.token_ids import TokenIds, common_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = ("a", "B", "1", "\n.", " x", "")
"""Contents that begin differently: what prompts with these share, prompts share in general."""


class EncodedPrompt(NamedTuple):
    """A guard's prompt, through the last token that is certain."""

    ids: list[int]
    cut: bool


class Frame(NamedTuple):
    """A guard's prompt without its contents, for one number of turns and one policy."""

    pieces: tuple[str, ...]
    """The text around the contents: one more than there are turns."""
    strips: tuple[bool, bool]
    """Whether the template strips white space on the left and on the right of contents."""
    control: tuple[int, ...]
    """The template's control tokens."""
    preamble: TokenIds
    """What prompts of this frame begin with."""
    tree: VerdictTree
    """The guard's answers from the end of a prompt's ids on."""
    overlap: int
    """Tokens at the prompt's end that an answer changes, and that its ids therefore begin with."""
    forced: TokenIds
    """What every answer begins with; a prompt's ids end with it."""
    category_start: TokenIds
    """What comes between a prompt's ids and the first category, where the verdict is unsafe."""
    codes: tuple[str, ...]
    """The categories that the guard may name."""

    def codes_in(self, text: str) -> tuple[str, ...]:
        """The categories named in the first line of `text`, in its order."""
        codes = "|".join(map(re.escape, sorted(self.codes, key=len, reverse=True)))
        lines = text.strip().splitlines()
        if not lines or not codes:
            return ()
        # Whole words: S1 is not named by an S15 that the guard does not have.
        return tuple(dict.fromkeys(re.findall(rf"(?<!\w)(?:{codes})(?!\w)", lines[0])))


class PromptWriter:
    """Writes prompts for one guard's tokenizer.

    Args:
        tokenizer: the guard's.
        profile: how the guard is asked.
        max_length: the guard's context window in tokens; `None` for no limit.
        policy: policies by code, in place of the guard's own.

    Raises:
        InputError: there is no chat template, or the guard takes no policy.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        profile: GuardProfile,
        *,
        max_length: int | None = None,
        policy: Mapping[str, str] | None = None,
    ) -> None:
        self.profile = profile
        self._template = GuardTemplate(tokenizer, profile, policy)
        self._plain = PlainText(tokenizer)
        self._name = tokenizer.name_or_path
        self._policy = policy
        self._max_length = max_length
        self._frames: dict[tuple[int, str | None], Frame] = {}

    def policies(self, conversation: Conversation) -> tuple[str | None, ...]:
        """Codes of the policies that are judged one by one; `(None,)` for all at once."""
        return self._template.policies(conversation)

    def frame(self, conversation: Conversation, policy: str | None) -> Frame:
        """The frame of a conversation of this many turns, under the policy of this code.

        Raises:
            InputError: the template leaves a turn out or cannot be rendered.
        """
        key = (len(conversation.turns), policy)
        if key not in self._frames:
            self._frames[key] = self._make_frame(conversation, policy)
        return self._frames[key]

    def check(self) -> None:
        """Write a prompt for a response, to see that it can be done.

        Raises:
            InputError: it cannot.
        """
        conversation = Conversation.of("a", "b")
        self.encode(conversation, self.policies(conversation)[0])

    def encode(self, conversation: Conversation, policy: str | None = None) -> EncodedPrompt:
        """Like `encode_all`, of one conversation."""
        return self.encode_all([conversation], policy)[0]

    def encode_all(
        self, conversations: Sequence[Conversation], policy: str | None = None
    ) -> list[EncodedPrompt]:
        """Ids of the prompts and of what every answer begins with; all have one number of turns.

        What exceeds the context window is cut from the end of the longest turn.

        Raises:
            InputError: the window is too small for the prompt without any content.
        """
        frame = self.frame(conversations[0], policy)
        contents = [_stripped(frame, map(encodable, each.turns)) for each in conversations]
        # The tokenizer reads many texts side by side.
        rows = self._plain.all_ids([self._text(frame, each) for each in contents])
        return [
            self._fitted(frame, *self._checked(frame, own, ids))
            for own, ids in zip(contents, rows, strict=True)
        ]

    def _fitted(self, frame: Frame, turns: list[str], ids: list[int]) -> EncodedPrompt:
        cut = False
        while True:
            ids = ids[: len(ids) - frame.overlap] + list(frame.forced)
            excess = len(ids) + self._answer_room - (self._max_length or len(ids) * 2**20)
            if excess <= 0:
                return EncodedPrompt(ids, cut)
            longest = max(range(len(turns)), key=lambda index: len(turns[index]))
            if not turns[longest]:
                raise InputError(
                    f"{self._name}: found a context window of {self._max_length} "
                    f"tokens; expected room for the guard's own prompt of {len(ids)}"
                )
            turns[longest], cut = self._plain.shortened(turns[longest], excess), True
            turns, ids = self._written(frame, turns)

    def _answers(self, reading: Reading, frame_end: str) -> dict[str, Meaning]:
        """The guard's answers, by text, from the end of its rendered prompt on."""
        if reading.prefix and not reading.before and frame_end.endswith(reading.prefix):
            reading = Reading(verdicts=reading.verdicts)
        return reading.answers()

    def _make_frame(self, conversation: Conversation, policy: str | None) -> Frame:
        reading = self.profile.reading(prompt=conversation.ends_with_prompt)
        count = len(conversation.turns)
        marks = [f"\ue000{index}\ue001" for index in range(count)]
        rendered = self._template.render([f" \n{mark} \n" for mark in marks], policy, conversation)
        strips = f" \n{marks[0]}" not in rendered, f"{marks[0]} \n" not in rendered
        rendered = self._template.render(marks, policy, conversation)
        pieces: list[str] = []
        for mark in marks:
            piece, found, rendered = rendered.partition(mark)
            if not found:
                raise InputError(
                    f"{self._name}: chat template: found none of turn "
                    f"{len(pieces) + 1} of {count} in its text; expected every turn, in order"
                )
            pieces.append(piece)
        self._template.check_policy("".join([*pieces, rendered]), policy)
        answers = self._answers(reading, rendered)
        frame = Frame((*pieces, rendered), strips, (), (), VerdictTree({}), 0, (), (), ())
        frame = frame._replace(
            control=self._plain.control_tokens(self._plain.ids("".join(frame.pieces)))
        )
        probed = [self._written(frame, [probe] * count)[1] for probe in _PROBES]
        whole = [self._plain.ids(self._text(frame, ["a"] * count) + answer) for answer in answers]
        start = common_length([probed[0], *whole])
        ids = [tuple(row[start:]) for row in whole]
        tree = VerdictTree(dict(zip(ids, answers.values(), strict=True)))
        branches = list(tree.branches) or [()]
        forced = branches[0][: common_length(branches)]
        rest = zip((answer[len(forced) :] for answer in ids), answers.values(), strict=True)
        categories = self.profile.categories
        codes: Sequence[str] = ()
        category_start: TokenIds = ()
        if categories is not None:
            unsafe = next(text for text, meaning in answers.items() if meaning == "unsafe")
            text = self._text(frame, ["a"] * count) + unsafe + categories.prefix
            category_start = tuple(self._plain.ids(text)[start + len(forced) :])
            codes = categories.codes
            if self._policy:
                codes = list(self._policy)
            elif categories.in_prompt is not None:
                codes = re.findall(categories.in_prompt, "".join(frame.pieces), re.MULTILINE)
        return frame._replace(
            preamble=tuple(probed[0][: common_length(probed)]),
            tree=VerdictTree(dict(rest)),
            overlap=len(probed[0]) - start,
            forced=forced,
            category_start=category_start,
            codes=tuple(codes),
        )

    @cached_property
    def _answer_room(self) -> int:
        """Tokens of the context window that are left for the answer."""
        readings = [reading for reading in (self.profile.prompt, self.profile.response) if reading]
        longest = max(len(self._plain.ids(text)) for r in readings for text in r.answers())
        return longest + (self.profile.categories.max_tokens if self.profile.categories else 0)

    def _text(self, frame: Frame, contents: Sequence[str]) -> str:
        pairs = zip(contents, frame.pieces[1:], strict=True)
        return "".join([frame.pieces[0], *(part for pair in pairs for part in pair)])

    def _written(self, frame: Frame, contents: Sequence[str]) -> tuple[list[str], list[int]]:
        """Contents as they stand in the prompt, and the prompt's ids."""
        texts = _stripped(frame, contents)
        return self._checked(frame, texts, self._plain.ids(self._text(frame, texts)))

    def _checked(
        self, frame: Frame, texts: list[str], ids: list[int]
    ) -> tuple[list[str], list[int]]:
        """The same, or with contents that become no control tokens."""
        if self._plain.control_tokens(ids) != frame.control:
            texts = [self._plain.defused(text) for text in texts]
            ids = self._plain.ids(self._text(frame, texts))
            if self._plain.control_tokens(ids) != frame.control:
                raise InputError(
                    f"{self._name}: found that a turn's text becomes a control "
                    "token; expected a tokenizer that keeps U+2060"
                )
        return texts, ids


def _stripped(frame: Frame, contents: Iterable[str]) -> list[str]:
    """Contents without the white space that the template takes from them."""
    left, right = frame.strips
    texts = [text.lstrip() if left else text for text in contents]
    return [text.rstrip() if right else text for text in texts]
