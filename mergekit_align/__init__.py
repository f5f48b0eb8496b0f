"""Keep safety alignment when language models are merged: a plugin for mergekit and lm-eval.

The package is a plugin of mergekit's: installing it is enough, since `autoload` puts an import hook
in place at interpreter start. Where that is turned off (`MERGEKIT_ALIGN_NO_AUTOLOAD=1`), call
`mergekit_align.register()`.

What each command does is a function here, loaded when it is asked for; the subpackage that is named
after the command holds the rest:

    from mergekit_align import evaluate_models, evolve_merge, read_evolution, write_evolved

    found = evolve_merge(read_evolution("examples/evolve_gradient.yml"))
    write_evolved(found, "merged")
    evaluation = evaluate_models(["aligned", "merged"], data=["test.jsonl"], guard="guard")

Importing this package costs nothing: no torch, no mergekit, no lm-eval until something is used.
"""

from mergekit_align.autoload import register

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mergekit_align.cocktail import merge as merge_cocktail
    from mergekit_align.cocktail import read_config as read_cocktail
    from mergekit_align.cocktail.mix import mix as mix_cocktail
    from mergekit_align.demo import build_world as build_demo_world
    from mergekit_align.errors import InputError
    from mergekit_align.evaluate import evaluate as evaluate_models
    from mergekit_align.evolve import read_config as read_evolution
    from mergekit_align.evolve import search as evolve_merge
    from mergekit_align.evolve.report import write_model as write_evolved
    from mergekit_align.generate import generate as generate_samples
    from mergekit_align.generate import read_config as read_generation
    from mergekit_align.guard import GuardSettings
    from mergekit_align.guard.run import judge_file as judge_responses
    from mergekit_align.report import add_safety_section, write_report
    from mergekit_align.statistics.collect import Source as SampleSource
    from mergekit_align.statistics.collect import collect_statistics

__version__ = "0.1.0"
__all__ = [
    "GuardSettings",
    "InputError",
    "SampleSource",
    "__version__",
    "add_safety_section",
    "build_demo_world",
    "collect_statistics",
    "evaluate_models",
    "evolve_merge",
    "generate_samples",
    "judge_responses",
    "merge_cocktail",
    "mix_cocktail",
    "read_cocktail",
    "read_evolution",
    "read_generation",
    "register",
    "write_evolved",
    "write_report",
]

# public name -> module, name there. No name is a subpackage's: importing one would put it in its place.
_WHERE = {
    "GuardSettings": ("guard", "GuardSettings"),
    "InputError": ("errors", "InputError"),
    "SampleSource": ("statistics.collect", "Source"),
    "add_safety_section": ("report", "add_safety_section"),
    "build_demo_world": ("demo", "build_world"),
    "collect_statistics": ("statistics.collect", "collect_statistics"),
    "evaluate_models": ("evaluate", "evaluate"),
    "evolve_merge": ("evolve", "search"),
    "generate_samples": ("generate", "generate"),
    "judge_responses": ("guard.run", "judge_file"),
    "merge_cocktail": ("cocktail", "merge"),
    "mix_cocktail": ("cocktail.mix", "mix"),
    "read_cocktail": ("cocktail", "read_config"),
    "read_evolution": ("evolve", "read_config"),
    "read_generation": ("generate", "read_config"),
    "write_evolved": ("evolve.report", "write_model"),
    "write_report": ("report", "write_report"),
}

if not TYPE_CHECKING:  # to a type checker it would make every name exist

    def __getattr__(name):
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module, own_name = _WHERE[name]
        value = getattr(import_module(f"{__name__}.{module}"), own_name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
