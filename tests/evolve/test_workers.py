"""Several candidates at the same time, on Ray; a node that is lost costs its candidates' time only."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mergekit_align.errors import InputError
from mergekit_align.evolve import read_config, search


@pytest.mark.slow
def test_two_nodes_of_which_one_dies(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    # Else whatever starts Ray at the same time would join this cluster. (A socket's path is short.)
    own = tempfile.mkdtemp(prefix="ray-")
    monkeypatch.setenv("RAY_TMPDIR", own)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    other = cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        path = write_config()
        config = read_config(path, evaluations=8)
        replaced = threading.Event()

        def lose_a_node(line: str) -> None:
            if line.startswith("3/") and not replaced.is_set():
                replaced.set()
                cluster.remove_node(other, allow_graceful=False)
                cluster.add_node(num_cpus=1)

        found = search(config, workers=2, progress=lose_a_node)
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(own, ignore_errors=True)
    assert replaced.is_set()
    assert sorted(each.asked for each in found.evaluations) == list(range(8))
    assert all(each.failure is None for each in found.evaluations)
    # One study, whoever evaluated: this process gives a candidate the same value.
    serial = search(read_config(path, storage=path.parent / "serial", evaluations=1))
    (first,) = [each for each in found.evaluations if each.asked == 0]
    np.testing.assert_array_equal(first.genotype, serial.evaluations[0].genotype)
    assert first.values == pytest.approx(serial.evaluations[0].values, abs=1e-5)
    # What was asked ahead is asked for again, so that the study goes on.
    more = search(read_config(path, evaluations=9), resume=True)
    assert len(more.evaluations) == 9


def test_an_address_that_does_not_answer_is_one_line(write_config: Callable[..., Path]) -> None:
    with pytest.raises(
        InputError, match=r"--ray-address: found 127.0.0.1:9, which does not answer"
    ):
        search(read_config(write_config()), workers=2, ray_address="127.0.0.1:9")
