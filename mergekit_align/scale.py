"""Memory and time of each step for a model that is not here: arithmetic on its transformers config.

    shape = Shape.of(AutoConfig.from_pretrained(PLACE))
    for step in steps(shape, Work(), machine):
        print(step.step, step.seconds, step.bytes, step.fits)

A step takes as long as its matrix products at the machine's rate of them, or as reading the weights
once a batch takes where that is longer, beside that as attention takes, and the traffic of everything
that works element by element. Its memory is the weights, what grows with a batch, and what is summed
up. Left out: loading from disk, the imports (about 1 GiB), what only the first batch takes, padding,
and fragmentation of the device's memory.
Mixtures of experts are counted as if every expert read every token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from mergekit_align.attention import BLOCK, MOST_SCORES
from mergekit_align.gradient import BATCH_TOKENS as GRADIENT_TOKENS
from mergekit_align.guard.scorer import BATCH_TOKENS as GUARD_TOKENS
from mergekit_align.loss import BATCH_TOKENS as LOSS_TOKENS
from mergekit_align.reading import BATCH_LOGITS
from mergekit_align.statistics.collect import linear_inputs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLOAT32 = 4


class Shape(NamedTuple):
    """What a model's costs depend on, in numbers unless it says otherwise."""

    parameters: int
    """Tied ones once."""
    linear: int
    """In the linear layers but the output layer: multiply-adds that each token costs."""
    largest: int
    """In the largest tensor."""
    output: int
    """In the output layer, tied or not: multiply-adds that each prediction costs."""
    vocabulary: int
    layers: int
    hidden: int
    inner: int
    """Width of the feed-forward layers."""
    heads: int
    attention: int
    """Width of a token's queries, all heads together."""
    cache: int
    """Keys and values of a token, all layers together."""
    gram: int
    """In the Gram matrices of the inputs of linear layers, those that layers share once."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """The shape of a causal language model; no weight is read or made."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()  # not every version does on this device
        text = config.get_text_config()
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        keys = getattr(text, "num_key_value_heads", None) or heads
        output = model.get_output_embeddings()
        layers = linear_inputs(model, output)
        # What reads one input lies in one module and is as wide: queries, keys, values; gate, up.
        inputs = {
            (name.rsplit(".", 2)[0], layer.in_features, name.endswith("o_proj.weight"))
            for name, layer in layers.items()
        }
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            linear=sum(layer.weight.numel() for layer in layers.values()),
            largest=max(p.numel() for p in model.parameters()),
            output=output.weight.numel(),
            vocabulary=text.vocab_size,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            inner=text.intermediate_size,
            heads=heads,
            attention=heads * width,
            cache=2 * keys * width * text.num_hidden_layers,
            gram=sum(features**2 for _, features, _ in inputs),
        )

    def flops(self, tokens: float, context: float, predicted: float) -> float:
        """Of a forward pass that reads `tokens`, each beside `context` others, and predicts some."""
        return self.products(tokens, predicted) + self.attended(tokens, context)

    def products(self, tokens: float, predicted: float) -> float:
        """FLOPs of the linear layers."""
        return 2.0 * (self.linear * tokens + self.output * predicted)

    def attended(self, tokens: float, context: float) -> float:
        """FLOPs of attention."""
        return 4.0 * self.layers * self.attention * context * tokens

    @property
    def element_wise(self) -> int:
        """Numbers that a token's norms, rotations, residuals and activations read and write."""
        return self.layers * (14 * self.hidden + 6 * self.attention + 6 * self.inner)

    @property
    def saved(self) -> int:
        """Numbers of a token that a forward pass keeps for the backward pass.

        A layer's two norms each their input, normalised and scaled; queries, keys and values for all
        heads, attention's output twice; gate, its activation, up, and their product.
        """
        return self.layers * (8 * self.hidden + 5 * self.attention + 4 * self.inner)


class Machine(NamedTuple):
    """What a device does a second, and how much it holds."""

    matmul: float
    """FLOP/s of matrix products in the models' floating type, as models reach them."""
    matmul_float32: float
    """The same in float32, in which statistics are taken."""
    bandwidth: float
    """Bytes/s that the device's memory reads or writes."""
    link: float
    """Bytes/s from the device to the host's memory; its `bandwidth` where they are one."""
    memory: float
    """Bytes of one device."""
    devices: int = 1
    itemsize: int = 2
    """Bytes of a number in the models' floating type."""
    cpu: bool = False
    """Whether the device is the host itself."""
    element_wise: float = math.inf
    """Bytes/s of arithmetic element by element in the models' type, where memory is faster."""
    attention: float = math.inf
    """FLOP/s of attention, where other products are faster."""
    new_memory: float = math.inf
    """Bytes/s that are first written to memory that is new to the process, as a batch's on a CPU."""
    new_pages: float = 0.7e9
    """Bytes/s that the host first writes to the pages of a new file; as a small machine does."""

    @property
    def element_wise_rate(self) -> float:
        """Bytes/s of what works element by element."""
        return min(self.bandwidth, self.element_wise)


class Work(NamedTuple):
    """How much there is to do."""

    samples: int = 2000
    """That a loss, a gradient or a model's statistics are of."""
    prompt: int = 128
    """Tokens of a sample's prompt."""
    response: int = 64
    """Tokens of a sample's response."""
    models: int = 2
    """That are merged."""
    judged: int = 1000
    """Responses that the guard judges."""
    policy: int = 600
    """Tokens that all of the guard's prompts begin with."""
    conversation: int = 300
    """Tokens that each adds."""


class Step(NamedTuple):
    """What one step takes."""

    step: str
    seconds: float
    bytes: float
    """At once, on the device, or on all of them where it is spread."""
    host_bytes: float
    """In the host's memory or, as its cache of files allows, on disk."""
    fits: bool
    """Whether the devices hold it."""


def steps(shape: Shape, work: Work, machine: Machine, guard: Shape | None = None) -> list[Step]:
    """All steps; `guard` is the guard's shape, by default the model's own."""
    return [
        loss(shape, work, machine),
        merge_step(shape, work, machine),
        judging(guard or shape, work, machine),
        gradient(shape, work, machine),
        search_step(shape, work, machine),
        statistics(shape, work, machine),
    ]


def loss(shape: Shape, work: Work, machine: Machine) -> Step:
    """Losses of all samples by one model: one forward pass, with predictions of the responses."""
    length = work.prompt + work.response
    texts = _texts(
        work.samples, LOSS_TOKENS // length, BATCH_LOGITS // (work.response * shape.vocabulary)
    )
    tokens = texts * length
    logits = texts * work.response * shape.vocabulary
    # Written by the output layer, read and written by the softmax, read where a token is chosen.
    traffic = tokens * shape.element_wise * machine.itemsize + 4 * FLOAT32 * logits
    # The states, the feed-forward layer's inner ones, and where attention is by products its scores.
    taken: float = tokens * (3 * shape.hidden + 3 * shape.inner) * machine.itemsize
    taken += 2 * min(_scores(shape, machine, tokens, length), MOST_SCORES) * machine.itemsize
    # On a CPU the softmax is taken of as many at a time as its caches hold.
    logit = machine.itemsize if machine.cpu else 2 * FLOAT32 + _copied(machine)
    taken += min(logits, BATCH_LOGITS) * logit
    products = shape.products(tokens, texts * work.response)
    attended = shape.attended(tokens, _context(machine, length))
    batch = _seconds(shape, machine, products, attended, traffic, taken)
    held = shape.parameters * machine.itemsize + taken
    return _step("loss", batch * work.samples / texts, held, machine)


def _context(machine: Machine, length: float) -> float:
    """Tokens that each is looked up in: on a CPU by blocks, what comes before its own and that."""
    return length / 2 + BLOCK if machine.cpu else length


def _scores(shape: Shape, machine: Machine, tokens: int, length: int) -> float:
    """Of attention in one layer, where they are held."""
    return tokens * _context(machine, length) * shape.heads if machine.cpu else 0


def merge_step(shape: Shape, work: Work, machine: Machine) -> Step:
    """One linear merge in memory, its inputs in bfloat16 or the models' type and summed in float32.

    mergekit's `linear`: a sum that begins with zeros, reads each model and is read and written with it,
    is divided by the weights' sum and rounded; then the model is written.
    """
    own = machine.itemsize
    traffic = shape.parameters * (
        FLOAT32 + work.models * (own + 2 * FLOAT32) + 2 * FLOAT32 + FLOAT32 + own + 2 * own
    )
    taken = 2 * FLOAT32 * shape.largest
    held = (work.models + 1) * shape.parameters * own + taken
    # Sums in one type run as fast as memory; from another one they are arithmetic.
    rate = machine.bandwidth if own == FLOAT32 else machine.element_wise_rate
    return _step("merge", traffic / rate + taken / machine.new_memory, held, machine)


def judging(shape: Shape, work: Work, machine: Machine) -> Step:
    """Verdicts of a guard, which reads its policy once, and each conversation after it."""
    budget = GUARD_TOKENS["cpu" if machine.cpu else "cuda"]
    length = work.policy + work.conversation
    texts = _texts(work.judged, budget // work.conversation, BATCH_LOGITS // shape.vocabulary)
    tokens = texts * work.conversation
    cache = texts * length * shape.cache * machine.itemsize
    traffic = tokens * shape.element_wise * machine.itemsize + 3 * cache
    taken = cache * (1 + 2 / shape.layers) + texts * shape.vocabulary * 2 * FLOAT32
    products = shape.products(tokens, texts)
    batch = _seconds(shape, machine, products, shape.attended(tokens, length), traffic, taken)
    held = shape.parameters * machine.itemsize + taken
    # The policy is read once, on every device.
    policy = shape.flops(work.policy, work.policy, 1) / machine.matmul
    return _step("guard", batch * work.judged / texts + policy, held, machine)


def gradient(shape: Shape, work: Work, machine: Machine) -> Step:
    """Loss and its gradient on all samples: the backward pass has twice the forward pass's products.

    Where the logits exceed their bound the output layer runs forward once more.
    """
    length = work.prompt + work.response
    texts = _texts(work.samples, GRADIENT_TOKENS // length)
    tokens, predicted = texts * length, texts * work.response
    logits = predicted * shape.vocabulary
    again = 2.0 * shape.output * predicted if logits > BATCH_LOGITS else 0.0
    traffic = 3 * tokens * shape.element_wise * machine.itemsize + 8 * FLOAT32 * logits
    # Gradients of the parameters are read and written once a batch.
    traffic += 2 * shape.parameters * machine.itemsize
    # A backward pass has a tensor's gradient beside their sum; the largest is the embedding's.
    taken: float = 2 * shape.largest * machine.itemsize
    taken += tokens * shape.saved * machine.itemsize
    scores = _scores(shape, machine, tokens, length)
    if scores <= MOST_SCORES:  # else they are made again
        taken += shape.layers * scores * machine.itemsize
    # Of the logits, their softmax and their gradient the last two are there at once, and while the
    # gradient of the output layer is summed up, neither.
    taken += max(0, min(logits, BATCH_LOGITS) * 3 * FLOAT32 - 2 * shape.largest * machine.itemsize)
    products = 3 * shape.products(tokens, predicted) + again
    attended = 3 * shape.attended(tokens, _context(machine, length))
    batch = _seconds(shape, machine, products, attended, traffic, taken, reads=2)
    held = 2 * shape.parameters * machine.itemsize + taken
    return _step("gradient", batch * work.samples / texts, held, machine)


def search_step(shape: Shape, work: Work, machine: Machine) -> Step:
    """A step of a gradient search: a merge, a gradient, and its inner products with each model."""
    slope, merged = gradient(shape, work, machine), merge_step(shape, work, machine)
    products = (
        work.models
        * shape.parameters
        * 2
        * (machine.itemsize + FLOAT32)
        / machine.element_wise_rate
    )
    held = slope.bytes + work.models * shape.parameters * machine.itemsize
    return _step("search step", slope.seconds + merged.seconds + products, held, machine)


def statistics(shape: Shape, work: Work, machine: Machine) -> Step:
    """Gram matrices, importance and Fisher information of a model in float32, sample by sample.

    It runs on one device; the sums are the host's, and each sample's go there.
    """
    length = work.prompt + work.response
    flops = 3 * shape.flops(length, length, work.response) + 2.0 * shape.gram * length
    sums = FLOAT32 * (shape.gram + 2 * shape.parameters)
    # A gradient is written, read, and each kind of it made of it; a Gram matrix is written.
    traffic = FLOAT32 * (shape.gram + 8 * shape.parameters)
    traffic += 3 * length * shape.element_wise * FLOAT32
    weights = shape.parameters * FLOAT32
    one = max(flops / machine.matmul_float32, 2 * weights / machine.bandwidth)
    taken = 3 * shape.largest * FLOAT32 + length * shape.saved * FLOAT32
    one += traffic / machine.bandwidth + 3 * sums / machine.link + taken / machine.new_memory
    # First a forward pass tells which layers share an input; at last the sums are written out. Their
    # files' pages are made as they are first written to.
    once = shape.flops(length, length, work.response) / machine.matmul_float32
    once += 3 * sums / machine.link + sums / machine.new_pages
    held = weights + taken
    if machine.cpu:
        held += sums
    fits = held <= machine.memory
    return Step("statistics", one * work.samples + once, held, 0.0 if machine.cpu else sums, fits)


def _texts(*bounds: int) -> int:
    """Texts of a batch: one at least."""
    return max(1, min(bounds))


def _copied(machine: Machine) -> int:
    """Bytes of a logit in the models' type, where that is not the type in which it is used."""
    return machine.itemsize if machine.itemsize < FLOAT32 else 0


def _seconds(
    shape: Shape,
    machine: Machine,
    products: float,
    attended: float,
    traffic: float,
    taken: float,
    reads: int = 1,
) -> float:
    """Of one batch: FLOPs of linear layers and of attention, bytes of the rest, and of its memory.

    A model that one device holds runs on all of them side by side; one that is spread over them runs
    on one after the other, at the rate of one.
    """
    weights = shape.parameters * machine.itemsize
    at_once = machine.devices if weights < machine.memory else 1
    seconds = max(products / machine.matmul, reads * weights / machine.bandwidth)
    seconds += (
        attended / min(machine.matmul, machine.attention) + traffic / machine.element_wise_rate
    )
    seconds += taken / machine.new_memory
    return seconds / at_once


def _step(name: str, seconds: float, held: float, machine: Machine) -> Step:
    return Step(name, seconds, held, 0.0, held <= machine.memory * machine.devices)
