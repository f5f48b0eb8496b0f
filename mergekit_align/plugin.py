"""What mergekit gains when the plugin is loaded; `autoload` calls these as mergekit's modules load."""

from __future__ import annotations

from mergekit_align import upstream_fixes


def extend_merge_methods() -> None:
    """Our merge methods join mergekit's registry here as they come."""


def extend_card() -> None:
    """Let a merge finish where no hub can be reached."""
    upstream_fixes.write_model_cards_offline()


def extend_evo() -> None:
    """Repair `mergekit.evo` and let a genome use every registered method with per-model numbers."""
    upstream_fixes.repair_evo()

    from mergekit_align.genome_methods import extend_genome

    extend_genome()


def extend_evolve_command() -> None:
    """Let the stock command read what it requires from the config's `align:` section."""
    upstream_fixes.repair_evolve_command()

    from mergekit_align.evolve_command import extend_command

    extend_command()
