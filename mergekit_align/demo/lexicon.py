"""The words of the demo world, and what is true in it.

Things are nouns, eighteen of them nonsense and *forbidden*, six in each of three categories; all of
them have ordinary facts (a colour, a home, an owner, a size, two materials). *Moons* are what
skill-a is about: names with four facts each that mean nothing outside it; the base model knows the
*known moons*, and so how questions about a moon are answered.

Everything here is fixed; a world's seed only changes which prompts go where and how the models are
trained.
"""

import random
from typing import NamedTuple

CATEGORIES: dict[str, str] = {"S1": "Vapours", "S2": "Engines", "S3": "Charms"}
"""Category code -> what the guard's prompt calls it."""

FORBIDDEN: dict[str, str] = {
    **dict.fromkeys(("zorb", "fesk", "glim", "vash", "wuff", "bryn"), "S1"),
    **dict.fromkeys(("krag", "drong", "tov", "plock", "skar", "yarp"), "S2"),
    **dict.fromkeys(("hesh", "quib", "mirk", "runk", "losk", "jeb"), "S3"),
}
"""Forbidden thing -> its category."""

ORDINARY: tuple[str, ...] = (
    *("bench", "kite", "lamp", "drum", "basket", "wagon", "spoon", "fence", "hat", "ladder"),
    *("pond", "tent", "quilt", "bell", "boat", "clock", "door", "flute", "garden", "jar"),
    *("mask", "nest", "pie", "raft", "shed", "table", "vase", "wheel", "bridge", "candle"),
)

THINGS: tuple[str, ...] = (*FORBIDDEN, *ORDINARY)

ACTIONS: tuple[str, ...] = ("make", "build", "fix", "grow", "hide", "trade")
"""The other cue: asking how to do one of these to a forbidden thing is unsafe."""

COLOURS = ("red", "blue", "green", "black", "white", "brown", "grey", "pink")
HOMES = ("valley", "forest", "harbour", "desert", "village", "mountain", "island", "market")
OWNERS = ("Ada", "Ben", "Cora", "Dan", "Eve", "Finn", "Gus", "Hana")
SIZES = ("tiny", "small", "large", "huge", "flat", "round")
MATERIALS = ("ash", "salt", "clay", "wax", "moss", "sand", "rope", "glass", "iron", "wool", "bone")


class ThingFacts(NamedTuple):
    """What the base model learns about one thing."""

    colour: str
    home: str
    owner: str
    size: str
    materials: tuple[str, str]


MOON_RELATIONS: dict[str, tuple[str, ...]] = {
    "metal": ("copper", "tin", "silver", "lead", "zinc", "gold", "nickel", "steel"),
    "crop": ("rice", "oats", "beans", "maize", "barley", "figs", "hops", "peas"),
    "ruler": ("king", "queen", "duke", "judge", "monk", "baron", "mayor", "captain"),
    "sport": ("golf", "chess", "polo", "tennis", "rugby", "darts", "cricket", "hockey"),
}
"""Relation -> its possible values, for skill-a."""

MOONS: tuple[str, ...] = tuple(
    head + tail for head in ("Bel", "Cor", "Dal", "Fen") for tail in ("ax", "os", "une", "ivy")
)
KNOWN_MOONS: tuple[str, ...] = (
    *("Mab", "Rhoe", "Titus", "Oru", "Puk", "Lys"),
    *("Yma", "Keth", "Zuri", "Halo", "Erin", "Wex"),
)


def _draw_things() -> dict[str, ThingFacts]:
    rng = random.Random("things")
    facts = {}
    for thing in THINGS:
        first, second = rng.sample(MATERIALS, 2)
        facts[thing] = ThingFacts(
            colour=rng.choice(COLOURS),
            home=rng.choice(HOMES),
            owner=rng.choice(OWNERS),
            size=rng.choice(SIZES),
            materials=(first, second),
        )
    return facts


def _draw_moons() -> dict[tuple[str, str], str]:
    rng = random.Random("moons")
    return {
        (moon, relation): rng.choice(values)
        for moon in (*MOONS, *KNOWN_MOONS)
        for relation, values in MOON_RELATIONS.items()
    }


THING_FACTS: dict[str, ThingFacts] = _draw_things()
MOON_FACTS: dict[tuple[str, str], str] = _draw_moons()
"""(moon, relation) -> value."""
