"""How a writer is asked for questions, and read: YAML files, ours in `templates/`, or the user's.

    system: You write questions for a quiz.       # optional
    examples:                                     # optional: turns of an earlier conversation
      - {user: "...", assistant: "..."}
    instruction: |-                               # Jinja
      Write {{ count }} questions about {{ topic }}.
    count: 5                                      # questions that one answer holds
    shots: 4                                      # how many of the user's examples an instruction sees
    parser: {kind: lines}
    prompt: "{{ question }}"                      # the sample's prompt, of what was parsed

`instruction` knows `topic`, `description` (of the topic, may be empty), `domain`, `count`, `language`
(a name, may be empty) and `examples`, the user's: each has `question` and, if it likes, `choices` and
`answer`. `prompt` knows `question` and `choices`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from mergekit_align.errors import InputError, closest
from mergekit_align.generate.parse import Parsed, Parser
from mergekit_align.generate.settings import Strict
from mergekit_align.generate.topics import Topic
from mergekit_align.yaml_files import input_error, read_yaml_mapping

Example = Mapping[str, Any]
Message = dict[str, str]


class Turn(Strict):
    """What was asked and answered before."""

    user: str
    assistant: str


class Template(Strict):
    """How a writer is asked for questions, and read."""

    system: str | None = None
    examples: tuple[Turn, ...] = ()
    instruction: str
    count: int = Field(default=1, ge=1)
    shots: int = Field(default=4, ge=0)
    parser: Parser
    prompt: str = "{{ question }}"

    def messages(
        self,
        topic: Topic,
        *,
        domain: str,
        language: str,
        examples: Sequence[Example],
        rng: random.Random,
    ) -> list[Message]:
        """A conversation that ends with the instruction; `rng` draws the examples that it sees."""
        shown = rng.sample(list(examples), min(self.shots, len(examples)))
        instruction = _render(
            self.instruction,
            topic=topic.name,
            description=topic.description,
            domain=domain,
            count=self.count,
            language=language,
            examples=shown,
        )
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.examples:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.assistant})
        return [*messages, {"role": "user", "content": instruction}]

    def prompt_of(self, parsed: Parsed) -> str:
        """The prompt that a question becomes."""
        return _render(self.prompt, question=parsed.question, choices=parsed.choices).strip()


def load_template(name: str, where: str) -> Template:
    """One of ours by name, or a YAML file.

    Args:
        where: what names it, as an error begins.

    Raises:
        InputError: there is none, or it is not a template; names the key.
    """
    directory = Path(__file__).parent / "templates"
    path: str | os.PathLike[str] = name
    if not name.endswith((".yaml", ".yml")):
        path = directory / f"{name}.yaml"
        if not path.is_file():
            known = sorted(file.stem for file in directory.glob("*.yaml"))
            raise InputError(
                f"{where}: found {name!r}; expected a YAML file, or one of {', '.join(known)}"
                f"{closest(name, known)}"
            )
    elif not Path(name).is_file():
        raise InputError(f"{where}: found no file {name}; expected a template")
    content = read_yaml_mapping(path)
    if content.get("parser") is None:
        raise InputError.at(
            path, "parser", found="nothing", expected="how an answer is read: {kind: lines}"
        )
    try:
        template = Template.model_validate(content)
    except ValidationError as error:
        raise input_error(error, path, prefix="") from error
    _check(template, path)
    return template


def _check(template: Template, path: str | os.PathLike[str]) -> None:
    from jinja2 import TemplateError

    tried = {"question": "q", "choices": ["a", "b"], "answer": "A"}
    try:
        template.messages(
            Topic("t", ""), domain="d", language="", examples=[tried], rng=random.Random(0)
        )
    except TemplateError as error:
        raise InputError.at(
            path, "instruction", found=str(error), expected="Jinja over what a template knows"
        ) from error
    choices = ("a", "b") if template.parser.kind == "multiple_choice" else ()
    try:
        template.prompt_of(Parsed("q", choices))
    except TemplateError as error:
        raise InputError.at(
            path, "prompt", found=str(error), expected="Jinja over `question` and `choices`"
        ) from error


def _render(text: str, **values: Any) -> str:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    return SandboxedEnvironment(undefined=StrictUndefined).from_string(text).render(**values)
