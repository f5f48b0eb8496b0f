"""A tiny world, trained on the CPU in minutes, on which every command of the package runs for real.

    build_world("demo")             # or: mergekit-align-demo demo

`grammar` defines its harmless prompts and the truth about them, `corpus` says who trains on what,
`recipes` trains a model, `world` builds it all. Refusals, over-refusals, skills and a guard are
there, small enough to look at; what the world cannot show is how any of it scales.
"""

from mergekit_align.demo.world import build_world

__all__ = ["build_world"]
