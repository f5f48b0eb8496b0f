"""What a guard model is, as data: how it is asked, and how its answer is read.

A profile is a YAML file; those of the field's guards are in `profiles/`, and a user's own is named by
its path. The prompt is written by the checkpoint's own chat template where it has one.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mergekit_align.errors import InputError, closest
from mergekit_align.guard.verdict import Meaning
from mergekit_align.yaml_files import input_error, read_yaml_mapping

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Choice(_Strict):
    """A question that the guard answers before the one that is asked."""

    prefix: str
    """Literal text before the answer."""
    options: list[str]
    """Its possible answers."""


class Reading(_Strict):
    """Where the verdict stands in a guard's answer, and what its words mean."""

    before: list[Choice] = []
    """Answers that come first; the verdict is averaged over them by their probabilities."""
    prefix: str = ""
    """Literal text before the verdict, the end of the prompt aside."""
    verdicts: dict[str, Meaning]
    """Each text that is a verdict, with what it means."""

    def answers(self) -> dict[str, Meaning]:
        """Every text from the end of the prompt through the verdict."""
        lists = [[choice.prefix + option for option in choice.options] for choice in self.before]
        return {
            "".join(path) + self.prefix + verdict: meaning
            for path in itertools.product(*lists)
            for verdict, meaning in self.verdicts.items()
        }


class Policy(_Strict):
    """How a guard is told what is unsafe: by an argument of its chat template."""

    argument: str
    """Name of the template's argument."""
    form: Literal["all", "one"]
    """`all`: the argument is a mapping of code to text; `one`: one policy a pass."""
    value: str | dict[str, str] = "{text}"
    """The argument of one policy, `{code}` and `{text}` filled in; without text, what needs none."""
    prompt: dict[str, str] = {}
    """Texts by code, for a prompt; empty leaves it to the template."""
    response: dict[str, str] = {}
    """Texts by code, for a response."""


class Categories(_Strict):
    """How a guard names what is violated, after it said "unsafe"."""

    prefix: str
    """Literal text between the unsafe verdict and the first category."""
    codes: list[str] = []
    """The categories; by default those that the prompt lists."""
    in_prompt: str | None = None
    """Regular expression whose first group is a code wherever the prompt lists one."""
    max_tokens: int = 24
    """Length of the longest list."""


class Recognition(_Strict):
    """How a checkpoint of this guard is told; every condition that is given must hold."""

    template: list[str] = []
    """Texts that its chat template contains."""
    template_lacks: list[str] = []
    """Texts that its chat template does not contain."""
    name: str | None = None
    """Regular expression that finds something in its name: its directory's, or the hub's."""
    model_type: list[str] = []
    """`model_type` in its config is one of these."""


class GuardProfile(_Strict):
    """A kind of guard model."""

    name: str
    """How the user calls it."""
    title: str
    """What its authors call it."""
    source: str
    """Where its format is published."""
    recognition: list[Recognition] = []
    """Any of these tells a checkpoint."""
    template: str | None = None
    """Chat template (Jinja), for a guard whose tokenizer has none."""
    question: str | None = None
    """What an ordinary chat model is asked, as a user's turn (Jinja over `messages`)."""
    last_turns: int | None = None
    """How many turns, the last, it reads; `None` for all."""
    add_generation_prompt: bool = True
    """Whether the chat template is asked for the opening of the answer."""
    template_arguments: dict[str, Any] = {}
    """Further arguments of the chat template."""
    policy: Policy | None = None
    """How it takes a policy; `None` where it has its own alone."""
    prompt: Reading | None
    """How the verdict on a prompt is read; `None` where it judges no prompts."""
    response: Reading
    """How the verdict on a response is read."""
    categories: Categories | None = None
    """How it names categories; `None` where it does not."""

    def reading(self, *, prompt: bool) -> Reading:
        """How the verdict on a prompt, or else on a response, is read.

        Raises:
            InputError: it judges no prompts.
        """
        reading = self.prompt if prompt else self.response
        if reading is None:
            raise InputError(f"{self.name} guards judge responses, not prompts alone")
        return reading

    def fits(self, *, template: str, names: Iterable[str], model_type: str) -> bool:
        """Whether a checkpoint of these properties is a guard of this kind."""
        import re

        def holds(rule: Recognition) -> bool:
            return (
                all(text in template for text in rule.template)
                and not any(text in template for text in rule.template_lacks)
                and (not rule.model_type or model_type in rule.model_type)
                and (
                    rule.name is None
                    or any(re.search(rule.name, name, re.IGNORECASE) for name in names)
                )
            )

        return any(holds(rule) for rule in self.recognition)


@cache
def profiles() -> Mapping[str, GuardProfile]:
    """The profiles that come with the package, by name."""
    found = [load_profile(path) for path in sorted(_directory().glob("*.yaml"))]
    return {profile.name: profile for profile in found}


def _directory() -> Path:
    return Path(__file__).parent / "profiles"


def load_profile(path: str | os.PathLike[str]) -> GuardProfile:
    """A profile from a YAML file.

    Raises:
        InputError: the file is missing or not a profile; names the key.
    """
    content = read_yaml_mapping(path)
    try:
        return GuardProfile.model_validate(content)
    except ValidationError as error:
        raise input_error(error, path, prefix="") from error


def choose_profile(
    name: str | None, *, model: str, config: Any, tokenizer: PreTrainedTokenizerBase
) -> GuardProfile:
    """The profile of a guard: by name, by the path of a YAML file, or told from the checkpoint.

    Raises:
        InputError: the name is unknown, or no profile fits; lists the profiles.
    """
    known = profiles()
    if name is not None:
        if name in known:
            return known[name]
        if name.endswith((".yaml", ".yml")):
            return load_profile(name)
        raise InputError(
            f"guard profile: found {name!r}; expected one of {', '.join(known)}, or a YAML file"
            f"{closest(name, known)}"
        )
    names = _own_names(model) | _own_names(getattr(config, "_name_or_path", ""))
    for profile in known.values():
        template = tokenizer.chat_template or ""
        if profile.fits(template=str(template), names=names, model_type=config.model_type):
            return profile
    raise InputError(
        f"{model}: found a {config.model_type} model that is no guard we know; expected one of "
        f"{', '.join(known)} (say which by --profile, or describe it in a YAML file)"
    )


def _own_names(model: str) -> set[str]:
    """A checkpoint's name and, in the hub's cache, its repository's; no other directory's."""
    parts = Path(os.path.abspath(model)).parts
    return {parts[-1], *(part for part in parts if part.startswith("models--"))} if model else set()
