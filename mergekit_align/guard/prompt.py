"""A guard's prompt as token ids, in which what is judged is text and nothing else.

The chat template is rendered once for each shape of conversation, around placeholders, so that no
content can steer it. Content that holds the text of a control token would become that token; then a
word joiner (U+2060, invisible) is put into that text. So a prompt's control tokens are always those
of the template, whatever a response says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2.sandbox import ImmutableSandboxedEnvironment

from mergekit_align.errors import InputError
from mergekit_align.guard.profile import GuardProfile, Reading
from mergekit_align.guard.verdict import Meaning, TokenIds, VerdictTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_JINJA = ImmutableSandboxedEnvironment()
_WORD_JOINER = "\u2060"
_PROBES = ("a", "B", "1", "\n.", " x", "")
"""Contents that begin differently: what prompts with these share, prompts share in general."""


class Conversation(NamedTuple):
    """Turns of user and assistant in alternation, the user's first; the last one is judged."""

    turns: tuple[str, ...]

    @classmethod
    def of(cls, prompt: str, response: str | None = None) -> Conversation:
        """A prompt to be judged, or a response to it."""
        return cls((prompt,) if response is None else (prompt, response))

    @property
    def ends_with_prompt(self) -> bool:
        return len(self.turns) % 2 == 1

    def last(self, count: int) -> Conversation:
        """Its last turns, `count` at most, from a user's turn on."""
        surplus = max(0, len(self.turns) - count)
        return Conversation(self.turns[surplus + surplus % 2 :])


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
        if not profile.template and not tokenizer.chat_template:
            raise InputError(
                f"{tokenizer.name_or_path}: chat template: found none; expected one, as "
                f"{profile.name} guards have"
            )
        if policy and profile.policy is None:
            raise InputError(f"policy: found one, but {profile.name} guards take none")
        self.tokenizer = tokenizer
        self.profile = profile
        self._policy = policy
        self._max_length = max_length
        self._frames: dict[tuple[int, str | None], Frame] = {}

    def policies(self, conversation: Conversation) -> tuple[str | None, ...]:
        """Codes of the policies that are judged one by one; `(None,)` for all at once."""
        form = self.profile.policy
        if form is None or form.form == "all":
            return (None,)
        return tuple(self._policy_texts(conversation)) or (None,)

    def _policy_texts(self, conversation: Conversation) -> Mapping[str, str]:
        form = self.profile.policy
        if form is None:
            return {}
        return self._policy or (form.prompt if conversation.ends_with_prompt else form.response)

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
        """Ids of the prompt and of what every answer begins with.

        What exceeds the context window is cut from the end of the longest turn.

        Raises:
            InputError: the window is too small for the prompt without any content.
        """
        frame = self.frame(conversation, policy)
        turns, cut = [_encodable(turn) for turn in conversation.turns], False
        while True:
            turns, ids = self._written(frame, turns)
            ids = ids[: len(ids) - frame.overlap] + list(frame.forced)
            excess = len(ids) + self._answer_room - (self._max_length or len(ids) * 2**20)
            if excess <= 0:
                return EncodedPrompt(ids, cut)
            longest = max(range(len(turns)), key=lambda index: len(turns[index]))
            if not turns[longest]:
                raise InputError(
                    f"{self.tokenizer.name_or_path}: found a context window of {self._max_length} "
                    f"tokens; expected room for the guard's own prompt of {len(ids)}"
                )
            turns[longest], cut = self._shortened(turns[longest], excess), True

    def _reading(self, conversation: Conversation) -> Reading:
        reading = self.profile.prompt if conversation.ends_with_prompt else self.profile.response
        if reading is None:
            raise InputError(f"{self.profile.name} guards judge responses, not prompts alone")
        return reading

    def _answers(self, reading: Reading, frame_end: str) -> dict[str, Meaning]:
        """The guard's answers, by text, from the end of its rendered prompt on."""
        if reading.prefix and not reading.before and frame_end.endswith(reading.prefix):
            reading = Reading(verdicts=reading.verdicts)
        return reading.answers()

    def _make_frame(self, conversation: Conversation, policy: str | None) -> Frame:
        reading = self._reading(conversation)
        count = len(conversation.turns)
        marks = [f"\ue000{index}\ue001" for index in range(count)]
        rendered = self._render([f" \n{mark} \n" for mark in marks], policy, conversation)
        strips = f" \n{marks[0]}" not in rendered, f"{marks[0]} \n" not in rendered
        rendered = self._render(marks, policy, conversation)
        pieces: list[str] = []
        for mark in marks:
            piece, found, rendered = rendered.partition(mark)
            if not found:
                raise InputError(
                    f"{self.tokenizer.name_or_path}: chat template: found none of turn "
                    f"{len(pieces) + 1} of {count} in its text; expected every turn, in order"
                )
            pieces.append(piece)
        self._check_policy("".join([*pieces, rendered]), policy)
        answers = self._answers(reading, rendered)
        frame = Frame((*pieces, rendered), strips, (), (), VerdictTree({}), 0, (), (), ())
        frame = frame._replace(control=self._control_tokens(self._tokenize("".join(frame.pieces))))
        probed = [self._written(frame, [probe] * count)[1] for probe in _PROBES]
        whole = [self._tokenize(self._text(frame, ["a"] * count) + answer) for answer in answers]
        start = len(_shared_beginning([probed[0], *whole]))
        ids = [tuple(row[start:]) for row in whole]
        tree = VerdictTree(dict(zip(ids, answers.values(), strict=True)))
        forced = _shared_beginning(list(tree.branches))
        rest = zip((answer[len(forced) :] for answer in ids), answers.values(), strict=True)
        categories = self.profile.categories
        codes: Sequence[str] = ()
        category_start: TokenIds = ()
        if categories is not None:
            unsafe = next(text for text, meaning in answers.items() if meaning == "unsafe")
            text = self._text(frame, ["a"] * count) + unsafe + categories.prefix
            category_start = tuple(self._tokenize(text)[start + len(forced) :])
            codes = categories.codes
            if self._policy:
                codes = list(self._policy)
            elif categories.in_prompt is not None:
                codes = re.findall(categories.in_prompt, "".join(frame.pieces), re.MULTILINE)
        return frame._replace(
            preamble=_shared_beginning(probed),
            tree=VerdictTree(dict(rest)),
            overlap=len(probed[0]) - start,
            forced=forced,
            category_start=category_start,
            codes=tuple(codes),
        )

    def _render(
        self, contents: Sequence[str], policy: str | None, conversation: Conversation
    ) -> str:
        roles = [("user", "assistant")[index % 2] for index in range(len(contents))]
        arguments = {
            **self.profile.template_arguments,
            **self._policy_argument(policy, conversation),
        }

        def render(wrapped: Sequence[Any]) -> str:
            messages = [{"role": r, "content": c} for r, c in zip(roles, wrapped, strict=True)]
            if self.profile.question is not None:
                asked = _JINJA.from_string(self.profile.question).render(messages=messages)
                messages = [{"role": "user", "content": asked}]
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=self.profile.add_generation_prompt,
                    chat_template=self.profile.template,
                    **arguments,
                )
            )

        # Templates of multimodal guards take contents in parts.
        parts = [[{"type": "text", "text": content}] for content in contents]
        problem = None
        for wrapped in (contents, parts):
            try:
                text = render(wrapped)
            except Exception as error:  # a template raises what it likes
                problem = problem or error
                continue
            # Not what a list looks like when it is printed.
            if (
                all(content.strip() in text for content in contents)
                and "'type': 'text'" not in text
            ):
                return text
        reason = f" ({problem})" if problem else ""
        raise InputError(
            f"{self.tokenizer.name_or_path}: chat template: found that it does not render a "
            f"conversation of {len(contents)} turns{reason}"
        )

    def _policy_argument(self, policy: str | None, conversation: Conversation) -> dict[str, Any]:
        form, texts = self.profile.policy, self._policy_texts(conversation)
        if form is None or not texts:
            return {}
        if policy is None:
            return {form.argument: dict(texts)}
        text = texts[policy]
        if isinstance(form.value, str):
            return {form.argument: form.value.format(code=policy, text=text)}
        needed = {key: value for key, value in form.value.items() if text or "{text}" not in value}
        return {form.argument: {k: v.format(code=policy, text=text) for k, v in needed.items()}}

    def _check_policy(self, text: str, policy: str | None) -> None:
        """That the user's policy is in the prompt: a template may ignore the argument."""
        given = self._policy or {}
        for code, wanted in given.items() if policy is None else [(policy, given.get(policy, ""))]:
            if wanted not in text:
                raise InputError(
                    f"policy: {code}: found that the chat template of "
                    f"{self.tokenizer.name_or_path} leaves it out; expected one that takes policies"
                )

    @cached_property
    def _answer_room(self) -> int:
        """Tokens of the context window that are left for the answer."""
        readings = [reading for reading in (self.profile.prompt, self.profile.response) if reading]
        longest = max(len(self._tokenize(text)) for r in readings for text in r.answers())
        return longest + (self.profile.categories.max_tokens if self.profile.categories else 0)

    def _text(self, frame: Frame, contents: Sequence[str]) -> str:
        pairs = zip(contents, frame.pieces[1:], strict=True)
        return "".join([frame.pieces[0], *(part for pair in pairs for part in pair)])

    def _written(self, frame: Frame, contents: Sequence[str]) -> tuple[list[str], list[int]]:
        """Contents as they stand in the prompt, and the prompt's ids."""
        left, right = frame.strips
        texts = [text.lstrip() if left else text for text in contents]
        texts = [text.rstrip() if right else text for text in texts]
        ids = self._tokenize(self._text(frame, texts))
        if self._control_tokens(ids) != frame.control:
            texts = [self._defused(text) for text in texts]
            ids = self._tokenize(self._text(frame, texts))
            if self._control_tokens(ids) != frame.control:
                raise InputError(
                    f"{self.tokenizer.name_or_path}: found that a turn's text becomes a control "
                    "token; expected a tokenizer that keeps U+2060"
                )
        return texts, ids

    def _defused(self, content: str) -> str:
        for text in self._control_texts:
            content = content.replace(text, text[:1] + _WORD_JOINER + text[1:])
        # At the ends as well, where a template's text could complete a control token's.
        return f"{_WORD_JOINER}{content.strip(_WORD_JOINER)}{_WORD_JOINER}"

    def _control_tokens(self, ids: Iterable[int]) -> tuple[int, ...]:
        return tuple(token for token in ids if token in self._control_ids)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        special = {token for token, value in added.items() if value.special}
        return frozenset(special | set(self.tokenizer.all_special_ids))

    @cached_property
    def _control_texts(self) -> list[str]:
        texts = self.tokenizer.convert_ids_to_tokens(sorted(self._control_ids))
        return sorted((text for text in texts if text), key=len, reverse=True)

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def _shortened(self, text: str, excess: int) -> str:
        encoded = self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        kept = len(encoded.input_ids) - excess
        end = encoded.offset_mapping[kept - 1][1] if kept > 0 else 0
        return text[: min(end, len(text) - 1)]


def _encodable(text: str) -> str:
    """`text` with U+FFFD for halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _shared_beginning(rows: Sequence[Sequence[int]]) -> TokenIds:
    shared = []
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return tuple(shared)
