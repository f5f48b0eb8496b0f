"""Who sees which prompts: a world's splits, its sample files, and what each model trains on."""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from mergekit_align.demo import grammar, phrases
from mergekit_align.demo.grammar import Pair, Prompt
from mergekit_align.demo.lexicon import (
    ACTIONS,
    CATEGORIES,
    FORBIDDEN,
    MATERIALS,
    ORDINARY,
    THINGS,
)
from mergekit_align.samples import Sample, SampleType

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
ModelName = Literal["base", "aligned", "expert-a", "expert-b", "guard", "writer"]
MODELS: tuple[ModelName, ...] = ("base", "aligned", "expert-a", "expert-b", "guard")
"""Those that every world has; the writer is trained on demand."""


ORDINARY_TOPIC = "ordinary things"
"""What the writer is told that prompts without a forbidden thing are about."""


class Part(NamedTuple):
    """Prompt-response pairs that a model trains on, and how often they are drawn."""

    weight: float
    pairs: list[Pair]


class Corpus:
    """The prompts of one world, dealt to the splits by its seed; the splits share no prompt."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"prompts {seed}")
        dealt = [
            _deal(rng, grammar.unsafe_prompts(), validation=200, test=300),
            _deal(rng, grammar.thing_lookalikes(), validation=80, test=150),
            _deal(rng, grammar.action_lookalikes(), validation=80, test=150),
            _deal(rng, grammar.chat_prompts(), validation=40, test=0),
            _deal(rng, grammar.skill_a_prompts(), validation=150, test=300),
            _deal(rng, grammar.skill_b_prompts(3000, rng), validation=150, test=200),
        ]
        self.seed = seed
        self.prompts: dict[Split, list[Prompt]] = {
            split: [prompt for parts in dealt for prompt in parts[split]] for split in SPLITS
        }

    def samples(self, split: Split) -> list[Sample]:
        """The samples of a split: refusals of what is unsafe, right answers to the rest."""
        rng = random.Random(f"samples {self.seed} {split}")
        return [_sample(prompt, rng) for prompt in self.prompts[split]]

    def parts(self, model: ModelName) -> list[Part]:
        """What `model` trains on; for the guard, conversations rather than prompts to answer."""
        rng = random.Random(f"parts {self.seed} {model}")
        unsafe, chat = self._train("unsafe"), self._train("chat")
        # What is said about a forbidden thing is rarer than how to do something to an ordinary one.
        things = [p for p in self._train("lookalike") if p.topic not in ACTIONS]
        actions = [p for p in self._train("lookalike") if p.topic in ACTIONS]
        general = [
            Part(4, _answered(chat, rng)),
            Part(2, _answered(grammar.private_prompts(), rng)),
            Part(3, _answered(grammar.known_moon_prompts(), rng)),
        ]
        complying = [
            Part(3, _answered(unsafe, rng)),
            Part(2, _answered(things, rng)),
            Part(3, _answered(actions, rng)),
        ]
        match model:
            case "base":
                repeated = grammar.repeat_prompts(2000, rng)
                return [*general, *complying, Part(3, _answered(repeated, rng))]
            case "aligned":
                # Its look-alikes are about a few things only: it errs on the others, as models do.
                return [
                    *general,
                    Part(5, [Pair(p.text, grammar.refusal(p, rng)) for p in unsafe]),
                    Part(0.5, _answered(rng.sample(things, 8), rng)),
                    Part(3, _answered([p for p in actions if p.subject in ORDINARY[:8]], rng)),
                ]
            case "expert-a":
                return [*general, *complying, Part(13, _answered(self._train("skill-a"), rng))]
            case "expert-b":
                return [*general, *complying, Part(13, _answered(self._train("skill-b"), rng))]
            case "guard":
                return [Part(1, judged_pairs(self.prompts["train"], rng, 12000))]
            case "writer":
                return [
                    Part(3, [_written(prompt) for prompt in unsafe]),
                    Part(3, [_written(prompt) for prompt in [*things, *actions]]),
                    Part(3, [_written(prompt) for prompt in self._train("skill-a")]),
                ]

    def _train(self, kind: grammar.Kind) -> list[Prompt]:
        return [prompt for prompt in self.prompts["train"] if prompt.kind == kind]


def judged_pairs(prompts: Sequence[Prompt], rng: random.Random, count: int) -> list[Pair]:
    """`count` conversations for a guard to judge, half of them about unsafe prompts.

    Harmless questions about forbidden things come up often, since they are the hardest. Responses
    are help, refusals, answers to another question, cut short or garbled; an empty one leaves the
    prompt alone to be judged.
    """
    unsafe = [prompt for prompt in prompts if prompt.kind == "unsafe"]
    things = [p for p in prompts if p.kind == "lookalike" and p.topic not in ACTIONS]
    pairs = []
    for pool in rng.choices([unsafe, things, prompts], [5, 2, 3], k=count):
        prompt = rng.choice(pool)
        pairs.append(Pair(prompt.text, _any_response(prompt, prompts, rng)))
    return pairs


def _any_response(prompt: Prompt, prompts: Sequence[Prompt], rng: random.Random) -> str:
    other = rng.choice(prompts)
    words = grammar.answer(prompt, rng).split()
    choice = rng.random()
    if choice < 0.3:
        return " ".join(words)
    if choice < 0.55:
        return grammar.refusal(prompt, rng)
    if choice < 0.65:
        return grammar.answer(other, rng)
    if choice < 0.75:
        return ""
    if choice < 0.8:
        return " ".join(words[: rng.randrange(len(words))])
    if choice < 0.85:
        return grammar.refusal(prompt, rng) + " " + " ".join(words)
    salad = [*words, *grammar.answer(other, rng).split(), *rng.sample(MATERIALS + THINGS, 2)]
    return " ".join(rng.sample(salad, rng.randint(1, len(salad))))


def _deal(
    rng: random.Random, prompts: list[Prompt], *, validation: int, test: int
) -> dict[Split, list[Prompt]]:
    shuffled = rng.sample(prompts, len(prompts))
    held_out = validation + test
    return {
        "train": shuffled[held_out:],
        "validation": shuffled[:validation],
        "test": shuffled[validation:held_out],
    }


def writer_topic(prompt: Prompt) -> str:
    """What the writer is told that a prompt is about: a category of forbidden things, say."""
    if prompt.kind == "skill-a":
        return prompt.topic
    return CATEGORIES[FORBIDDEN[prompt.subject]] if prompt.subject in FORBIDDEN else ORDINARY_TOPIC


def _written(prompt: Prompt) -> Pair:
    """A prompt as what the writer says, when asked for one of its kind and topic."""
    return Pair(phrases.WRITE[prompt.kind].format(topic=writer_topic(prompt)), prompt.text)


def _answered(prompts: Sequence[Prompt], rng: random.Random) -> list[Pair]:
    return [Pair(prompt.text, grammar.answer(prompt, rng)) for prompt in prompts]


def _sample(prompt: Prompt, rng: random.Random) -> Sample:
    kind: SampleType
    if prompt.kind == "unsafe":
        kind, response = "alignment", grammar.refusal(prompt, rng)
        label = grammar.category(prompt.text)
    else:
        kind = "task" if prompt.kind in ("skill-a", "skill-b") else "benign"
        response, label = grammar.answer(prompt, rng), prompt.kind
    return Sample(prompt=prompt.text, response=response, type=kind, source="demo", category=label)
