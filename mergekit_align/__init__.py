"""Keep safety alignment when language models are merged: a plugin for mergekit and lm-eval.

The package is a plugin of mergekit's: installing it is enough, since `autoload` puts an import hook
in place at interpreter start. Where that is turned off (`MERGEKIT_ALIGN_NO_AUTOLOAD=1`), call
`mergekit_align.register()`.

Importing this package costs nothing: no torch, no mergekit, no lm-eval until something is used.
"""

from mergekit_align.autoload import register

__version__ = "0.1.0"
__all__ = ["__version__", "register"]
