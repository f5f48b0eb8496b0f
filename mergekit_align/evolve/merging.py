"""A merge config -> the one model that every candidate is: its parameters are overwritten in place.

What a candidate costs is its arithmetic: the plan (see `planning`), the inputs (memory-mapped where
mergekit does not convert them) and the model itself are made once. mergekit's kernels merge, in the
order in which `mergekit-yaml` runs them, so that the bits are the same, those of random methods too.
Methods in `kernels` have faster ways to the same bits.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from mergekit.architecture import get_architecture_info
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge import (
    _get_donor_model,
    _model_out_config,
    _set_chat_template,
    _update_config_vocab,
)
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_align.devices import give_memory_back
from mergekit_align.errors import InputError
from mergekit_align.evolve.kernels import KERNELS, Kernel, kernel_for
from mergekit_align.evolve.planning import PlannedTensor, Planner, TensorMerge
from mergekit_align.parallel import one_thread

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMALL = 2**24
"""Parameters up to which merges are not compiled, and not shared among threads."""
_GIVEN_BACK = 2**25
"""Numbers after which the memory that preparing them took is given back."""


class _Job(NamedTuple):
    """What one tensor of a candidate is merged into, and how."""

    merge: TensorMerge
    target: torch.Tensor
    kernel: Kernel | None
    """Ours; `None` where mergekit's own merges it."""


class MergedModel:
    """The model that candidates are merged into.

    Args:
        config: of some candidate; what all of them have in common is taken from it.
        options: mergekit's; its `random_seed` is that of every candidate's random draws.
        device: where the model is and the merging happens.
        dtype: floating type of the model's arithmetic; merging has the config's.
        fast: whether our own kernels may merge; mergekit's do otherwise.

    Raises:
        InputError: this architecture's checkpoints cannot be merged in memory.
    """

    def __init__(
        self,
        config: MergeConfiguration,
        options: MergeOptions,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        fast: bool = True,
    ) -> None:
        self._options = options
        self._device = device
        self._fast = fast
        self._architecture = get_architecture_info(config, options)
        LoaderCache().setup(options)
        self._out_config = _model_out_config(
            config, self._architecture, trust_remote_code=options.trust_remote_code
        )
        self._planner = Planner(config, self._architecture, options, self._out_config)
        self._order = self._order_on_disk(config)
        self.tokenizer: PreTrainedTokenizerBase = self._make_tokenizer(config)
        self.model: PreTrainedModel = self._make_model(config, dtype)
        # By checkpoint name; of parameters that are tied, the first name alone.
        self._targets: dict[str, torch.nn.Parameter] = dict(self.model.named_parameters())
        self._written: dict[str, object] = {}
        """Of what a kernel last merged each parameter; the numbers are those of the plan's models."""
        self._kernel_of: dict[PlannedTensor, Kernel | None] = {}

    def resolve(self, config: MergeConfiguration) -> list[TensorMerge]:
        """The tensors of a candidate, in the order in which `mergekit-yaml` merges them."""
        merges = self._planner.plan(config)
        return sorted(merges, key=lambda merge: self._order.get(merge.weight.name, 0))

    def parameter(self, name: str) -> torch.nn.Parameter | None:
        """The model's parameter of a checkpoint's name; `None` of one that is tied to another."""
        return self._targets.get(name)

    def merge(self, config: MergeConfiguration) -> list[TensorMerge]:
        """Make the model this candidate; how, tensor by tensor."""
        merges = self.resolve(config)
        self._load(merges)
        if self._options.random_seed is not None:
            _set_seed(self._options.random_seed, self._device)
        jobs = [
            _Job(merge, target, self._merging_kernel(merge, config.out_dtype))
            for merge in merges
            if (target := self._target(merge.weight.name)) is not None
        ]
        missing = self._targets.keys() - {merge.weight.name for merge in merges}
        if missing:
            raise InputError(
                f"{self._out_config.architectures[0]}: found no tensor {min(missing)} in the merge; "
                "expected a checkpoint with the model's own names"
            )
        _prepare(jobs)
        with one_thread() if self._is_small else nullcontext():
            for job in jobs:
                self._merge_tensor(job, config.out_dtype)
        return merges

    def _merge_tensor(self, job: _Job, out_dtype: str | None) -> None:
        merge, target, kernel = job
        name = merge.weight.name
        if kernel is not None:
            made_of = (merge.planned, merge.shared, [*merge.own.values()])
            if self._written.pop(name, None) != made_of:
                kernel.merge(target, merge.shared, merge.own)
            self._written[name] = made_of
            return
        self._written.pop(name, None)
        task = merge.planned.task.model_copy(
            update={"parameters": merge.shared, "input_parameters": merge.own}
        )
        tensor = task.execute(tensors=merge.planned.inputs)
        if tensor is None:  # optional, and too few inputs have it
            return
        dtype = _dtype(merge, out_dtype)
        target.copy_(tensor if dtype is None else tensor.to(dtype))

    def _merging_kernel(self, merge: TensorMerge, out_dtype: str | None) -> Kernel | None:
        """Ours where it gives what is asked for: bfloat16, and nothing scaled anew."""
        plain = _dtype(merge, out_dtype) in (None, torch.bfloat16)
        return self.kernel(merge) if plain and not merge.shared.get("rescale") else None

    def kernel(self, merge: TensorMerge) -> Kernel | None:
        """Ours for a tensor; `None` where mergekit's own merges it."""
        if not self._fast:
            return None
        planned = merge.planned
        if planned not in self._kernel_of:
            assert planned.inputs is not None
            self._kernel_of[planned] = kernel_for(planned.task, planned.inputs, self._kernels)
        return self._kernel_of[planned]

    @cached_property
    def _is_small(self) -> bool:
        size: int = sum(parameter.numel() for parameter in self.model.parameters())
        return size < SMALL

    @cached_property
    def _kernels(self) -> Mapping[str, Callable[..., Kernel]]:
        """Compiled ones where they save more time than it takes to load them."""
        if self._device != "cpu" or self._is_small or find_spec("numba") is None:
            return KERNELS
        from mergekit_align.evolve.compiled import COMPILED

        return COMPILED

    def _order_on_disk(self, config: MergeConfiguration) -> dict[str, int]:
        """Output tensors by their place in `mergekit-yaml`'s schedule: random methods draw in it."""
        planner = MergePlanner(
            config.model_copy(deep=True), self._architecture, self._options, self._out_config
        )
        tasks = planner.plan_to_disk(out_path=os.devnull)
        schedule = Executor(tasks).schedule.tasks
        names = [
            task.tensor_name
            for task in (handle.task() for handle in schedule)
            if isinstance(task, SaveTensor)
        ]
        return {name: place for place, name in enumerate(names)}

    def _load(self, merges: Sequence[TensorMerge]) -> None:
        new = [merge.planned for merge in merges if merge.planned.inputs is None]
        if not new:
            return
        tasks = [planned.task.gather_tensors for planned in new]
        gathered = dict(Executor(list(dict.fromkeys(tasks))).run(quiet=True))
        for planned, task in zip(new, tasks, strict=True):
            planned.inputs = {
                model: tensor.to(self._device) for model, tensor in gathered[task].items()
            }

    def _make_tokenizer(self, config: MergeConfiguration) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        task = self._planner._tokenizer_task
        if task is not None:
            (_, built), *_ = Executor([task]).run(quiet=True)
            tokenizer: PreTrainedTokenizerBase = built.tokenizer
            _update_config_vocab(self._out_config, self._architecture, tokenizer)
            _set_chat_template(tokenizer, config)
            return tokenizer
        _, place = _get_donor_model(config, self._options)
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, trust_remote_code=self._options.trust_remote_code
        )
        return found

    def _make_model(self, config: MergeConfiguration, dtype: torch.dtype) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.initialization import no_init_weights

        with no_init_weights():
            made = AutoModelForCausalLM.from_config(
                self._out_config,
                dtype=dtype,
                trust_remote_code=self._options.trust_remote_code,
            )
        _, place = _get_donor_model(config, self._options)
        if os.path.exists(os.path.join(place, "generation_config.json")):
            made.generation_config = GenerationConfig.from_pretrained(place)
        made.tie_weights()  # which is left out with the initial weights
        model: PreTrainedModel = made.to(self._device).eval().requires_grad_(False)
        return model

    def _target(self, name: str) -> torch.Tensor | None:
        """The parameter of that name; `None` of one that is tied to another, which says what it is."""
        if name in self._targets:
            return self._targets[name].data
        tied = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        buffers: dict[str, torch.Tensor] = dict(self.model.named_buffers())
        if name in tied:
            return None
        if name in buffers:
            return buffers[name]
        raise InputError(
            f"{self._out_config.architectures[0]}: found no parameter {name} in the model; expected "
            "the checkpoints' names to be the model's own"
        )


def _prepare(jobs: Sequence[_Job]) -> None:
    """All of it before a first merge, when the model's own memory is not yet in use.

    The largest first, while few inputs have been read.
    """
    prepared = 0
    for merge, target, kernel in sorted(jobs, key=lambda job: job.target.numel(), reverse=True):
        if kernel is not None and kernel.prepare(merge.own):
            prepared += target.numel()
        if prepared > _GIVEN_BACK:
            prepared = 0
            give_memory_back()
    if prepared:
        give_memory_back()


def _set_seed(seed: int, device: str) -> None:
    """As `mergekit-yaml` does, but on a CPU without the trace that PyTorch formats for a GPU."""
    if device != "cpu":
        from transformers.trainer_utils import set_seed

        set_seed(seed)
        return
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def _dtype(merge: TensorMerge, out_dtype: str | None) -> torch.dtype | None:
    """Of a merged tensor; `None` for that of its inputs."""
    dtype: torch.dtype | None = dtype_from_name(merge.weight.force_dtype or out_dtype)
    return dtype
