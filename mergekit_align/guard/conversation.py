"""What a guard judges."""

from __future__ import annotations

from typing import NamedTuple


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
