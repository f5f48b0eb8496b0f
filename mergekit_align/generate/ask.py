"""The first stage: questions, written by models or taken from what exists, until there are enough.

Writers are asked in rounds. Each round asks for what is missing of each topic, more where little of
what was written could be used, until nothing is missing or the rounds are used up. What a round asks
depends on the earlier rounds' answers alone, so that a run asks the same when it is resumed or shared.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from mergekit_align.generate.config import Asked, Config, PoolModel, apportion
from mergekit_align.generate.filter import Filter
from mergekit_align.generate.language import NAMES
from mergekit_align.generate.parse import Parsed
from mergekit_align.generate.records import Question
from mergekit_align.generate.template import Message
from mergekit_align.generate.topics import Topic
from mergekit_align.generate.work import Reply, Worker
from mergekit_align.refusal import xstest_strmatch

SURPLUS = 1.25
"""Questions that the first round asks for, for each that is wanted."""
MOST = 8
"""Times what is missing that a round asks for at most."""

Counts = dict[tuple[str, str], Counter[str]]
"""By what is asked (its key in the config) and topic: how many were asked for, parsed, ..., kept."""


class Questions(NamedTuple):
    """What the stage found."""

    questions: list[Question]
    counts: Counts
    short: dict[str, tuple[int, int]]
    """Of what there is less than was asked for, by key: found and wanted."""


class _Request(NamedTuple):
    asked: Asked
    topic: Topic
    messages: list[Message]


def ask(config: Config, worker: Worker, progress: Callable[[str], None]) -> Questions:
    """The questions of a config, in the order of what it asks for."""
    collected = _Collected(config)
    for asked in config.asked:
        if asked.existing:
            collected.take_existing(asked)
    for attempt in range(config.settings.questions.attempts):
        requests = collected.requests(attempt)
        if not requests:
            break
        for writer, own in _by_writer(requests):
            replies = worker.replies(
                writer,
                [request.messages for request in own],
                config.settings.questions,
                key=f"{attempt}/{writer.name}",
                seed=config.seed(config.settings.questions.seed),
            )
            for request, reply in zip(own, replies, strict=True):
                collected.take(request, reply)
        progress(
            f"questions: round {attempt + 1}: {len(requests)} requests, "
            f"{collected.missing()} questions missing"
        )
    worker.close()
    return collected.result()


def _by_writer(requests: list[_Request]) -> list[tuple[PoolModel, list[_Request]]]:
    """Requests by who answers them; those of one writer stay in order."""
    found: dict[str, tuple[PoolModel, list[_Request]]] = {}
    for request in requests:
        assert request.asked.writer is not None
        writer = request.asked.writer
        found.setdefault(repr(writer), (writer, []))[1].append(request)
    return list(found.values())


class _Collected:
    """Questions so far, and what is missing still."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._filter = Filter(config.settings.quality, config.settings.language, config.evaluation)
        self._wanted: dict[tuple[str, str], int] = {}
        self._questions: dict[str, list[Question]] = {asked.key: [] for asked in config.asked}
        self.counts: Counts = {}
        for asked in config.asked:
            self._filter.know(asked.type, _shown(asked))
            shares = apportion(asked.samples, [topic.share for topic in asked.topics])
            for topic, share in zip(asked.topics, shares, strict=True):
                self._wanted[asked.key, topic.name] = share
                self.counts[asked.key, topic.name] = Counter()

    def missing(self) -> int:
        return sum(
            max(0, wanted - self.counts[place]["kept"]) for place, wanted in self._wanted.items()
        )

    def requests(self, attempt: int) -> list[_Request]:
        """What a round asks for; it is counted."""
        found = []
        seed = self._config.seed(self._config.settings.questions.seed)
        for asked in self._config.asked:
            if asked.template is None:
                continue
            for topic in asked.topics:
                counts = self.counts[asked.key, topic.name]
                wanted = self._wanted[asked.key, topic.name]
                number = _requests_for(wanted, counts, asked.template.count)
                counts["requests"] += number
                for index in range(number):
                    rng = random.Random(f"{seed} {asked.key} {topic.name} {attempt} {index}")
                    messages = asked.template.messages(
                        topic,
                        domain=asked.domain or "",
                        language=NAMES.get(self._config.settings.language or "", ""),
                        examples=asked.examples,
                        rng=rng,
                    )
                    found.append(_Request(asked, topic, messages))
        return found

    def take(self, request: _Request, reply: Reply) -> None:
        asked, topic = request.asked, request.topic
        assert asked.template is not None
        assert asked.writer is not None
        counts = self.counts[asked.key, topic.name]
        counts["asked"] += asked.template.count
        if xstest_strmatch(reply.text) == "full refusal":
            counts["writer refused"] += 1
            return
        for parsed in asked.template.parser.parse(reply.text, cut=reply.cut):
            counts["parsed"] += 1
            prompt = asked.template.prompt_of(parsed)
            self._consider(asked, topic.name, parsed, prompt, asked.writer.name)

    def take_existing(self, asked: Asked) -> None:
        """As many as are wanted of prompts that exist, alike over their categories."""
        seed = self._config.seed(self._config.settings.questions.seed)
        drawn = list(asked.existing)
        random.Random(f"{seed} {asked.key} existing").shuffle(drawn)
        by_category: dict[str, list[str]] = {}
        for existing in drawn:
            category = existing.category or asked.domain or asked.type
            by_category.setdefault(category, []).append(existing.prompt)
        # The rarest first: what one category lacks, the others make up for.
        left, wanted = len(by_category), asked.samples
        for category, prompts in sorted(by_category.items(), key=lambda item: len(item[1])):
            place = (asked.key, category)
            self._wanted[place], self.counts[place] = -(-wanted // left), Counter()
            for prompt in prompts:
                if self.counts[place]["kept"] == self._wanted[place]:
                    break
                self.counts[place].update(("asked", "parsed"))
                self._consider(asked, category, Parsed(prompt), prompt, asked.origin)
            wanted -= self.counts[place]["kept"]
            left -= 1
        for place in [place for place in self._wanted if place[0] == asked.key]:
            self._wanted[place] = self.counts[place]["kept"]

    def _consider(self, asked: Asked, topic: str, parsed: Parsed, prompt: str, source: str) -> None:
        counts = self.counts[asked.key, topic]
        if counts["kept"] == self._wanted[asked.key, topic]:
            counts["surplus"] += 1
            return
        reason = self._filter.reason_against(asked.type, parsed.question, prompt)
        counts[reason or "kept"] += 1
        if reason is None:
            questions = self._questions[asked.key]
            questions.append(
                Question(
                    id=f"{asked.key}-{len(questions)}",
                    type=asked.type,
                    topic=topic,
                    domain=asked.domain,
                    prompt=prompt,
                    choices=len(parsed.choices),
                    source=source,
                )
            )

    def result(self) -> Questions:
        short = {
            asked.key: (len(self._questions[asked.key]), asked.samples)
            for asked in self._config.asked
            if len(self._questions[asked.key]) < asked.samples
        }
        questions = [each for asked in self._config.asked for each in self._questions[asked.key]]
        return Questions(questions, self.counts, short)


def _shown(asked: Asked) -> list[str]:
    """Questions that a writer is shown, and may repeat."""
    shown = [str(example["question"]) for example in asked.examples]
    if asked.template is not None:
        for turn in asked.template.examples:
            shown += [each.question for each in asked.template.parser.parse(turn.assistant)]
    return shown


def _requests_for(wanted: int, counts: Counter[str], count: int) -> int:
    """Requests of `count` questions each, by what came of the earlier ones."""
    missing = wanted - counts["kept"]
    if missing <= 0:
        return 0
    if not counts["requests"]:
        return math.ceil(missing * SURPLUS / count)
    usable = counts["kept"] + counts["surplus"]
    # One more, so that a topic without any is not given up.
    rate = (usable + 1) / (counts["requests"] + 1)
    return min(math.ceil(missing / rate), math.ceil(missing / count) * MOST)
