"""`kernels` compiled by numba, to the same bits: a number is read, merged and written once, on a CPU.

PyTorch runs one operation after another, each over a stretch of all tensors; here all of a merge is one
loop. What it makes on the way is float32, rounded to bfloat16 wherever mergekit's operations round.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from mergekit.common import ModelReference
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from mergekit_align.evolve.kernels import Kernel, LinearKernel, TaskArithmeticKernel, TiesKernel

_STRETCH = 2**14
"""Numbers that a thread merges at a time."""
_BLOCK = 2**11
"""Numbers that stay in the nearest cache from step to step."""
_MAGNITUDE = np.uint32(0x7FFF0000)
_SIGN = np.uint32(0x80000000)
_WHOLE = -1
"""A threshold that every magnitude exceeds."""

_inlined = numba.njit(error_model="numpy", inline="always")


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compiled when it is called first, and kept on disk where there is a place for it."""
    try:
        return numba.njit(function, error_model="numpy", cache=True, **options)
    except RuntimeError:  # neither the package's directory nor the user's can be written to
        return numba.njit(function, error_model="numpy", **options)


def _parallel(function: Callable[..., Any]) -> Any:
    return _compiled(function, parallel=True)


@intrinsic
def _float(context, bits):  # type: ignore[no-untyped-def]
    """The float32 number of these bits."""

    def code(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.FloatType())

    return numba.float32(numba.uint32), code


@intrinsic
def _bits(context, number):  # type: ignore[no-untyped-def]
    """Of a float32 number, uint32."""

    def code(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.IntType(32))

    return numba.uint32(numba.float32), code


@intrinsic
def _upper(context, number):  # type: ignore[no-untyped-def]
    """The upper half of a float32 number's bits, uint16.

    Of uint32 numba would make 64 bits before it shifts them, at several times the cost.
    """

    def code(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        return builder.trunc(builder.lshr(bits, ir.Constant(ir.IntType(32), 16)), ir.IntType(16))

    return numba.uint16(numba.float32), code


@intrinsic
def _fused(context, left, right, term):  # type: ignore[no-untyped-def]
    """left * right + term, rounded once."""

    def code(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    return numba.float32(numba.float32, numba.float32, numba.float32), code


@_inlined
def _number(bits):  # type: ignore[no-untyped-def]
    """A bfloat16 number as float32."""
    return _float(np.uint32(bits) << np.uint32(16))


@_inlined
def _rounded(number):  # type: ignore[no-untyped-def]
    """A float32 number to bfloat16: to the nearest, of two the even one.

    What is no number stays so: of such the lower bits are zeros.
    """
    bits = _bits(number)
    half = np.uint32(0x8000) if bits & np.uint32(0x10000) else np.uint32(0x7FFF)
    return _float((bits + half) & np.uint32(0xFFFF0000))


def _write(out: Any, place: Any, number: Any) -> None:
    """A number into an array of float32, or of bfloat16's bits, which it is rounded to already."""


@overload(_write, inline="always")
def _(out, place, number):  # type: ignore[no-untyped-def]
    def whole(out, place, number):  # type: ignore[no-untyped-def]
        out[place] = number

    def half(out, place, number):  # type: ignore[no-untyped-def]
        out[place] = _upper(number)

    return whole if out.dtype == numba.float32 else half


@_parallel
def _linear(out, tensors, weights, divisor, fused):  # type: ignore[no-untyped-def]
    size = len(out)
    for stretch in numba.prange((size + _STRETCH - 1) // _STRETCH):
        start, end = stretch * _STRETCH, min(size, (stretch + 1) * _STRETCH)
        for n in range(np.uintp(start), np.uintp(end)):
            mixed = np.float32(0)
            for index in range(len(tensors)):
                if fused:
                    mixed = _fused(_number(tensors[index][n]), weights[index], mixed)
                else:
                    mixed += _number(tensors[index][n]) * weights[index]
            if divisor is not None:
                mixed /= divisor
            _write(out, n, _rounded(mixed))


@_parallel
def _task_arithmetic(out, base, tensors, weights, first, divisor, scale):  # type: ignore[no-untyped-def]
    size = len(out)
    for stretch in numba.prange((size + _STRETCH - 1) // _STRETCH):
        start, end = stretch * _STRETCH, min(size, (stretch + 1) * _STRETCH)
        for n in range(np.uintp(start), np.uintp(end)):
            origin = _number(base[n])
            mixed = first
            for index in range(len(tensors)):
                delta = _rounded(_number(tensors[index][n]) - origin)
                mixed += _rounded(delta * weights[index])
            mixed = _rounded(mixed)
            if divisor is not None:
                mixed = _rounded(mixed / divisor)
            if scale is not None:
                mixed = _rounded(mixed * scale)
            _write(out, n, _rounded(mixed + origin))


@_parallel
def _ties(  # type: ignore[no-untyped-def]
    out, base, tensors, weights, thresholds, equals, first, normalize, scale
):
    size, models = len(out), len(tensors)
    for stretch in numba.prange((size + _STRETCH - 1) // _STRETCH):
        deltas = np.empty((models, _BLOCK), np.float32)
        mixed, totals = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
        for start in range(stretch * _STRETCH, min(size, (stretch + 1) * _STRETCH), _BLOCK):
            block = out[start : start + _BLOCK]
            count = len(block)
            origin = base[start : start + count]
            for index in range(models):
                equal = equals[index]
                equal = equal[np.searchsorted(equal, start) : np.searchsorted(equal, start + count)]
                tensor = tensors[index][start : start + count]
                _select(deltas[index], tensor, origin, weights[index], thresholds[index])
                for place in equal:
                    n = place - start
                    delta = _rounded(_number(tensor[n]) - _number(origin[n]))
                    deltas[index, n] = _rounded(delta * weights[index])
            _elect(mixed, totals, deltas, weights, first, count)
            for n in range(count):
                change = _rounded(mixed[n])
                if normalize:
                    total = _rounded(totals[n])
                    change = _rounded(change / (total if total != 0 else np.float32(1)))
                _write(block, n, _rounded(_rounded(change * scale) + _number(origin[n])))


@_compiled
def _select(deltas, tensor, origin, weight, threshold):  # type: ignore[no-untyped-def]
    """A block of a weighted task vector, zeros where a number is not above the threshold."""
    for n in range(len(tensor)):
        delta = _rounded(_number(tensor[n]) - _number(origin[n]))
        bits = _bits(delta)
        kept = np.int32((bits & _MAGNITUDE) >> np.uint32(16)) > threshold
        deltas[n] = _rounded((delta if kept else _float(bits & _SIGN)) * weight)


@_compiled
def _elect(mixed, totals, deltas, weights, first, count):  # type: ignore[no-untyped-def]
    """Sums of the numbers that have the prevailing sign, and of their weights."""
    prevailing = np.empty(count, np.uint32)
    for n in range(count):
        mixed[n] = first
    for index in range(len(deltas)):
        for n in range(count):
            mixed[n] += deltas[index, n]
    for n in range(count):
        prevailing[n] = _bits(_rounded(mixed[n])) & _SIGN
        mixed[n] = totals[n] = first
    for index in range(len(deltas)):
        weight = weights[index]
        for n in range(count):
            delta = deltas[index, n]
            sign = _bits(delta) & _SIGN
            counts = sign == prevailing[n] and delta != 0
            mixed[n] += delta if counts else _float(sign)
            totals[n] += weight if counts else _float(_bits(weight) & _SIGN)


_WRITTEN = torch.float32, torch.bfloat16
"""Floating types of models that are merged into."""
_MODELS = 16
"""PyTorch adds up so many rows one after another, and more in several sums."""


class _CompiledKernel(Kernel):
    """Comes before the kernel that it replaces, which merges what is not compiled."""

    _tensors: list[torch.Tensor]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._inputs = _arrays(self._tensors)

    def merge(
        self,
        target: torch.Tensor,
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> None:
        if (
            target.dtype not in _WRITTEN
            or not target.is_contiguous()
            or len(self._tensors) > _MODELS
        ):
            super().merge(target, shared, own)  # type: ignore[safe-super]
            return
        _use_torch_threads()
        self._run(_out(target), shared, own)

    @abstractmethod
    def _run(
        self,
        out: NDArray[Any],
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> None:
        """As `merge`, into the target [numbers], of bfloat16 its bits."""


class CompiledLinearKernel(_CompiledKernel, LinearKernel):
    """`linear`, compiled."""

    def _run(
        self,
        out: NDArray[Any],
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> None:
        weights = self._weights(own, torch.device("cpu"))
        divisor = np.float32(weights.sum().item()) if shared["normalize"] else None
        _linear(out, self._inputs, weights.numpy(), divisor, _addcmul_is_fused())


class CompiledTaskArithmeticKernel(_CompiledKernel, TaskArithmeticKernel):
    """`task_arithmetic`, compiled."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._origin = _arrays([self._base])[0]

    def _run(
        self,
        out: NDArray[Any],
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> None:
        weights = self._weights(own, torch.device("cpu"))
        divisor = self._divisor(weights, None).item() if shared["normalize"] else 1.0
        scale = shared["lambda"]
        _task_arithmetic(
            out,
            self._origin,
            self._inputs,
            weights.float().numpy().ravel(),
            _first(self._tensors),
            None if divisor == 1 else np.float32(divisor),
            None if scale == 1 else np.float32(scale),
        )


class CompiledTiesKernel(CompiledTaskArithmeticKernel, TiesKernel):
    """`ties`, compiled."""

    def _run(
        self,
        out: NDArray[Any],
        shared: Mapping[str, Any],
        own: Mapping[ModelReference, Mapping[str, Any]],
    ) -> None:
        kept = self._select(own)
        none = np.empty(0, np.int32)
        _ties(
            out,
            self._origin,
            self._inputs,
            self._weights(own, torch.device("cpu")).float().numpy().ravel(),
            np.array([_WHOLE if each is None else each.threshold for each in kept], np.int32),
            tuple(none if each is None else each.equal.numpy() for each in kept),
            _first(self._tensors),
            shared["normalize"],
            np.float32(shared["lambda"]),
        )


COMPILED: Mapping[str, type[Kernel]] = {
    "linear": CompiledLinearKernel,
    "task_arithmetic": CompiledTaskArithmeticKernel,
    "ties": CompiledTiesKernel,
}
"""By method, as `KERNELS`."""


@cache
def _addcmul_is_fused() -> bool:
    """Whether mergekit's product and sum is rounded once, which is the processor's affair."""
    number = torch.full((64,), 1 + 2**-12)  # whose square has more bits than a float32
    return bool((-number.square()).addcmul_(number, number).any())


def _out(target: torch.Tensor) -> NDArray[Any]:
    """What is written, [numbers]."""
    if target.dtype == torch.bfloat16:
        return _arrays([target.view(-1)])[0]
    written: NDArray[Any] = target.view(-1).numpy()
    return written


def _use_torch_threads() -> None:
    threads = torch.get_num_threads()
    wanted = min(threads, numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != wanted:
        numba.set_num_threads(wanted)
    if torch.get_num_threads() != threads:  # numba has just started its own
        torch.set_num_threads(threads)


def _arrays(tensors: Sequence[torch.Tensor]) -> tuple[NDArray[Any], ...]:
    """The bits of bfloat16 tensors [numbers], uint16."""
    return tuple(tensor.view(torch.int16).numpy().view(np.uint16) for tensor in tensors)


def _first(rows: Sequence[Any]) -> Any:
    """What rows are added to: two as they are, and others, as PyTorch's sum does, to 0."""
    return np.float32(-0.0 if len(rows) == 2 else 0.0)
