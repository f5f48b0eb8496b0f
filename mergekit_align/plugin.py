"""What mergekit gains when the plugin is loaded; `autoload` calls these as mergekit's modules load."""

from __future__ import annotations

from typing import Any

from mergekit_align import upstream_fixes


def extend_merge_methods() -> None:
    """Our merge methods join mergekit's registry."""
    from mergekit.merge_methods import registered_methods
    from mergekit.merge_methods.registry import register

    from mergekit_align.merge_methods.methods import METHODS

    known = {method.spec.name for method in registered_methods()}
    for method in METHODS:
        if method.spec.name not in known:
            register(method)


def extend_planner() -> None:
    """Let adapters be merged whole, and methods of ours only by a config with what they need."""
    upstream_fixes.merge_adapters_whole()

    from mergekit.plan import MergePlanner

    from mergekit_align.merge_methods.checks import check_merge

    original = MergePlanner.__init__
    if getattr(original, "checks_merge", False):
        return

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        check_merge(config)
        original(self, config, *args, **kwargs)

    __init__.checks_merge = True  # type: ignore[attr-defined]
    MergePlanner.__init__ = __init__


def extend_card() -> None:
    """Let a merge finish where no hub can be reached."""
    upstream_fixes.write_model_cards_offline()


def extend_evo() -> None:
    """Let `mergekit.evo` load, and a genome use every registered method with per-model numbers."""
    upstream_fixes.repair_evo()

    from mergekit_align.genome_methods import extend_genome

    extend_genome()


def extend_evaluations() -> None:
    """Repair what evaluates the stock command's candidates."""
    upstream_fixes.repair_evaluations()


def extend_actors() -> None:
    """Repair the actors in which they are evaluated."""
    upstream_fixes.free_no_gpu_memory_without_a_gpu()


def extend_strategies() -> None:
    """Repair what gives them to these."""
    upstream_fixes.repair_strategies()


def extend_evolve_command() -> None:
    """Let the stock command read what it requires from the config's `align:` section."""
    upstream_fixes.repair_evolve_command()

    from mergekit_align.evolve_command import extend_command

    extend_command()
