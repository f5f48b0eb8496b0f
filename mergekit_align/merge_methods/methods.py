"""All our merge methods, as the plugin registers them with mergekit."""

from mergekit.merge_methods.base import MergeMethod

from mergekit_align.merge_methods.align_adaptive import align_adaptive
from mergekit_align.merge_methods.fisher import fisher
from mergekit_align.merge_methods.led import led
from mergekit_align.merge_methods.lox import lox
from mergekit_align.merge_methods.lssf import lssf
from mergekit_align.merge_methods.regmean import regmean
from mergekit_align.merge_methods.regmean_plus import regmean_plus
from mergekit_align.merge_methods.resta import resta
from mergekit_align.merge_methods.safe_lora import safe_lora
from mergekit_align.merge_methods.safemerge import safemerge

METHODS: tuple[MergeMethod, ...] = (
    align_adaptive,
    fisher,
    led,
    lox,
    lssf,
    regmean,
    regmean_plus,
    resta,
    safe_lora,
    safemerge,
)
