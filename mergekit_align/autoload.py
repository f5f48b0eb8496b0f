"""The import hook through which mergekit finds the plugin.

`autoload.pth`, installed beside the package, imports this module at every interpreter start, Ray's
workers included; so it imports nothing that the interpreter has not loaded already (`importlib`
and `__future__` alone would double what it costs). The hook waits for the few mergekit modules that
the plugin extends, lets each load as usual, and then calls `mergekit_align.plugin`. Programs that
never import those modules pay for one dictionary lookup an import.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# module of mergekit -> function of mergekit_align.plugin to call when it has loaded
EXTENDED_MODULES = {
    "mergekit.merge_methods": "extend_merge_methods",
    "mergekit.plan": "extend_planner",
    "mergekit.card": "extend_card",
    "mergekit.evo": "extend_evo",
    "mergekit.evo.helpers": "extend_evaluations",
    "mergekit.evo.actors": "extend_actors",
    "mergekit.evo.strategy": "extend_strategies",
    "mergekit.scripts.evolve": "extend_evolve_command",
}


def _extend(module_name: str) -> None:
    from mergekit_align import plugin

    getattr(plugin, EXTENDED_MODULES[module_name])()


class _ExtendingLoader:
    def __init__(self, loader: "Loader") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        return self._loader.create_module(spec)

    def exec_module(self, module: "ModuleType") -> None:
        self._loader.exec_module(module)
        _extend(module.__name__)


class PluginFinder:
    """Finds the modules that the plugin extends, and nothing else."""

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname not in EXTENDED_MODULES:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ExtendingLoader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


def register() -> None:
    """Put the plugin in place: now for what mergekit has loaded already, by the hook for the rest.

    May be called any number of times.
    """
    if not any(isinstance(finder, PluginFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PluginFinder())
        for name in EXTENDED_MODULES:
            if name in sys.modules:
                _extend(name)
