"""Search for merges: the same YAML as stock `mergekit-evolve`, in one process and in memory.

Three ideas: a *candidate* is merged into the one model and scored (`candidate`), a *searcher* asks and
is told (`searchers`), a *study* remembers (`study`).

    config = read_config("examples/genomic.yml")
    found = search(config, resume=True, progress=print)
    config.genes.config(found.best.genotype).to_yaml()
"""

from mergekit_align.evolve.candidate import Evaluator
from mergekit_align.evolve.config import EvolveConfig, read_config
from mergekit_align.evolve.run import Search, SearchError, search
from mergekit_align.evolve.study import Evaluation

__all__ = [
    "Evaluation",
    "Evaluator",
    "EvolveConfig",
    "Search",
    "SearchError",
    "read_config",
    "search",
]
