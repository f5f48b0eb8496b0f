"""Values by sample as a study keeps them: single precision, compressed, a line of text a metric."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mergekit_align.evolve.sample_values import SampleValues

_KIND = np.dtype("<f4")


def compact(values: SampleValues) -> SampleValues:
    """The values as they are when they are read back, so that a resumed search has the same."""
    return {metric: own.astype(_KIND).astype(np.float64) for metric, own in values.items()}


def write_compact(values: SampleValues) -> dict[str, dict[str, str]]:
    """By task and metric, as JSON has it."""
    found: dict[str, dict[str, str]] = {}
    for (task, metric), own in values.items():
        packed = zlib.compress(own.astype(_KIND).tobytes())
        found.setdefault(task, {})[metric] = base64.b64encode(packed).decode("ascii")
    return found


def read_compact(written: Mapping[str, Mapping[str, str]]) -> SampleValues:
    """What `write_compact` wrote."""
    return {
        (task, metric): np.frombuffer(zlib.decompress(base64.b64decode(own)), _KIND).astype(
            np.float64
        )
        for task, metrics in written.items()
        for metric, own in metrics.items()
    }
