"""Our merge methods, one a file; the plugin registers them with mergekit."""

from mergekit.merge_methods.base import MergeMethod

from mergekit_align.merge_methods.lox import lox
from mergekit_align.merge_methods.resta import resta
from mergekit_align.merge_methods.safe_lora import safe_lora
from mergekit_align.merge_methods.safemerge import safemerge

METHODS: tuple[MergeMethod, ...] = (lox, resta, safe_lora, safemerge)
