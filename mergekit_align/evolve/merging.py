"""A merge config -> the one model that every candidate is: its parameters are overwritten in place.

What a candidate costs is its arithmetic: the plan of which tensors go into which, the inputs
(memory-mapped where mergekit does not convert them) and the model itself are made once. mergekit
resolves each config's parameters and its kernels merge, in the order in which `mergekit-yaml` runs
them, so that the bits are the same, those of random methods too. Methods in `kernels` have faster
ways to the same bits.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import (
    ConditionalParameter,
    ConfigReader,
    MergeConfiguration,
    OutputSliceDefinition,
)
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge import (
    _get_donor_model,
    _model_out_config,
    _set_chat_template,
    _update_config_vocab,
)
from mergekit.merge_methods import get
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.parameter_resolver import resolve_parameters
from mergekit.plan import MergePlanner

from mergekit_align.devices import give_memory_back
from mergekit_align.errors import InputError
from mergekit_align.evolve.kernels import KERNELS, Kernel, kernel_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMPILED_FROM = 2**24
"""Parameters of a model whose merges are compiled."""
_GIVEN_BACK = 2**25
"""Numbers after which the memory that preparing them took is given back."""


class _Planned:
    """A tensor of certain inputs, once they are loaded."""

    def __init__(self, task: ExecuteMergeMethodTask) -> None:
        self.task = task
        """How mergekit makes it; of the first candidate that had the same inputs."""
        self.inputs: dict[ModelReference, torch.Tensor] | None = None


class TensorMerge(NamedTuple):
    """One tensor of a candidate."""

    weight: WeightInfo
    planned: _Planned
    shared: dict[str, Any]
    """The method's parameters that all inputs share."""
    own: dict[ModelReference, dict[str, Any]]
    """Those of each input."""


class _Job(NamedTuple):
    """What one tensor of a candidate is merged into, and how."""

    merge: TensorMerge
    target: torch.Tensor
    kernel: Kernel | None
    """Ours; `None` where mergekit's own merges it."""


class _Place(NamedTuple):
    """Where a tensor stands in the plan of configs that differ in their numbers alone."""

    weight: WeightInfo
    planned: _Planned
    names: dict[ModelReference, str]
    """What the tensor is called in each input."""
    base: ModelReference | None
    slice: tuple[str, int]
    """Module, and which of its slices gives the parameters."""
    t: float


class _Planner(MergePlanner):  # type: ignore[misc]
    """mergekit's planner, which plans once what candidates have in common: all but the numbers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._plans: dict[Hashable, list[_Place]] = {}
        self._planned: dict[Hashable, _Planned | None] = {}
        self._places: list[_Place] = []

    def plan(self, config: MergeConfiguration) -> list[TensorMerge]:
        """What a candidate's tensors are merged from, and by which numbers."""
        # Planning changes modules in place, and replaces all else.
        self.config = config.model_copy(deep=config.modules is not None)
        self._method = get(config.merge_method)
        self.normalize_config()
        slices = self._slices()
        inputs = [
            (
                place,
                each.base_model,
                *((source.model, source.layer_range) for source in each.sources),
            )
            for place, each in slices.items()
        ]
        key = (config.merge_method, config.base_model, *inputs)
        if key not in self._plans:
            self._tensors: list[Any] = []
            self._places = []
            self._plan()
            self._plans[key] = self._places
        parameters = {place: self._parameters(*place) for place in slices}
        return [
            TensorMerge(each.weight, each.planned, *parameters[each.slice].of(each))
            for each in self._plans[key]
        ]

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        base = cfg_reader.base_model
        names = {model: each.name for model, each in zip(models, weights_in, strict=True)}
        key = (self._method.spec.name, weight.name, *models, *names.values(), base)
        if key not in self._planned:
            before = len(self._tensors)
            super().plan_tensor(weight, weights_in, models, cfg_reader)
            tensors = self._tensors[before:]  # nothing where no input has an optional tensor
            self._planned[key] = _Planned(tensors[0][1]) if tensors else None
        planned = self._planned[key]
        if planned is not None:
            place = next(p for p, each in self._slices().items() if each is cfg_reader.slice_out)
            self._places.append(_Place(weight, planned, names, base, place, cfg_reader.t))

    def _slices(self) -> dict[tuple[str, int], OutputSliceDefinition]:
        return {
            (module, index): each
            for module, definition in self.config.modules.items()
            for index, each in enumerate(definition.slices)
        }

    def _parameters(self, module: str, index: int) -> _SliceParameters:
        definition = self.config.modules[module]
        reader = ConfigReader(
            config=self.config, t=0, slice_out=definition.slices[index], module=definition
        )
        return _SliceParameters(self._method.spec, reader)


class _SliceParameters:
    """What a slice of a candidate gives its tensors: the same to those that it does not tell apart.

    It does by filters, and by lists of numbers, which it spreads over its layers.
    """

    def __init__(self, spec: Any, reader: ConfigReader) -> None:
        self._spec = spec
        self._sources = cache(lambda model: tuple(reader.parameter_sources(model)))
        models = [source.model for source in reader.slice_out.sources]
        sources = [s.values() for model in [None, *models] for s in self._sources(model) if s]
        settings = list(chain.from_iterable(sources))
        parts = chain.from_iterable(s if isinstance(s, list) else [s] for s in settings)
        conditions = [each for each in parts if isinstance(each, ConditionalParameter)]
        self._filters = {each.filter for each in conditions if each.filter is not None}
        plain = [*settings, *(each.value for each in conditions)]
        self._by_layer = any(
            isinstance(each, list) and not isinstance(each[0], ConditionalParameter)
            for each in plain
            if each
        )
        self._known: dict[Hashable, tuple[dict[str, Any], dict[ModelReference, Any]]] = {}

    def of(self, place: _Place) -> tuple[dict[str, Any], dict[ModelReference, dict[str, Any]]]:
        """Those that all inputs of a tensor share, and those of each input."""
        names = (place.weight.name, *place.names.values())
        key = (
            place.t if self._by_layer else None,
            *(part in name for name in names for part in self._filters),
        )
        if key not in self._known:
            self._known[key] = resolve_parameters(
                self._spec,
                tensor_name=place.weight.name,
                inputs=place.names,
                sources=self._sources,
                base_model=place.base,
                t=place.t,
            )
        return self._known[key]


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
        self._planner = _Planner(config, self._architecture, options, self._out_config)
        self._order = self._order_on_disk(config)
        self.tokenizer: PreTrainedTokenizerBase = self._make_tokenizer(config)
        self.model: PreTrainedModel = self._make_model(config, dtype)
        # By checkpoint name; of parameters that are tied, the first name alone.
        self._targets: dict[str, torch.nn.Parameter] = dict(self.model.named_parameters())
        self._written: dict[str, object] = {}
        self._kernel_of: dict[_Planned, Kernel | None] = {}

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
        for job in jobs:
            self._merge_tensor(job, config.out_dtype)
        return merges

    def _merge_tensor(self, job: _Job, out_dtype: str | None) -> None:
        merge, target, kernel = job
        name = merge.weight.name
        if kernel is not None:
            made_of = (merge.planned, merge.shared, merge.own)
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
    def _kernels(self) -> Mapping[str, Callable[..., Kernel]]:
        """Compiled ones where they save more time than it takes to load them."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        if self._device != "cpu" or size < COMPILED_FROM or find_spec("numba") is None:
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
