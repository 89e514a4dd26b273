"""Plans an exported network for integer kernels: what is folded, and how every tensor is stored.

A layer absorbs the batch norm and the ReLU behind it. Tensors between layers are stored in 8 bits:
at the levels of the layer that takes one, if that is all that takes it; otherwise as a *stream*,
256 levels over the range seen on training images, from which each layer takes its own levels.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from metamix_jax.exporters.graph import IMAGE, Graph, Node, Quantizer

CONTAINER_BITS = 8
HIGHEST = 255
SAME_LEVELS = frozenset({"max_pool", "flatten", "subsample"})  # the same on levels as on values
RECTIFIERS = {"relu": np.inf, "relu6": 6.0}  # -> the greatest result
GATES = frozenset({"hswish", "hsigmoid"})  # constant below -GATE_FROM
GATE_FROM = 3.0
FROM_0_TO_1 = frozenset({"hsigmoid", "sigmoid"})
OPS = SAME_LEVELS | GATES | FROM_0_TO_1 | RECTIFIERS.keys() | {
    "conv", "dense", "mean", "add", "multiply",
}  # fmt: skip


class Storage(NamedTuple):
    """Real values x as uint8: round(x / step) + zero, clipped to low .. high."""

    step: float
    zero: int
    low: int = 0
    high: int = HIGHEST


GATE = Storage(1 / HIGHEST, 0)  # of values from 0 to 1


@dataclasses.dataclass(frozen=True)
class Step:
    """A node of the graph, with those behind it that it absorbs.

    node: the first of them.
    output: name of the result.
    levels: int8, of a layer's kernel; its step is float64 [features], and so is its bias.
    least, most: bounds of the result, if a ReLU gives them.
    """

    node: Node
    output: str
    levels: np.ndarray | None = None
    step: np.ndarray | None = None
    bias: np.ndarray | None = None
    least: float = -np.inf
    most: float = np.inf


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of a network, in order, and how tensors are stored.

    storage: of all but the scores.
    streams: those that are not stored at the levels of the layer that takes them.
    """

    steps: tuple[Step, ...]
    storage: Mapping[str, Storage]
    streams: frozenset[str]


def unsupported(graph: Graph) -> str:
    """Returns an operation without an integer kernel; "" if there is none."""
    for node in (step.node for step in fold(graph.nodes)):
        if node.op == "affine":
            return "a constant scale or offset that follows no layer"
        if node.op == "dense" and len(node.shape) > 1:
            return "a dense layer over positions"
        if node.op not in OPS:
            return node.op
    return "a tensor that is neither an image nor features" if graph.general else ""


def fold(nodes: Sequence[Node]) -> tuple[Step, ...]:
    """Returns the steps of a network: batch norms and ReLUs join the nodes before them."""
    users: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
    steps, absorbed = [], set()
    for node in nodes:
        if node.name in absorbed:
            continue
        chain = [node]
        while len(then := users.get(chain[-1].name, [])) == 1 and _absorbs(chain, then[0]):
            chain += then
        absorbed |= {each.name for each in chain}
        steps.append(_step(chain))
    return tuple(steps)


def _absorbs(chain: Sequence[Node], then: Node) -> bool:
    if chain[-1].op in RECTIFIERS:
        return False
    if then.op == "affine":
        return chain[0].kernel is not None
    return then.op in RECTIFIERS and (chain[0].kernel is not None or chain[0].op == "add")


def _step(chain: Sequence[Node]) -> Step:
    node, last = chain[0], chain[-1]
    bounds = (0.0, RECTIFIERS[last.op]) if last.op in RECTIFIERS else (-np.inf, np.inf)
    if node.kernel is None:
        return Step(node, last.name, None, None, None, *bounds)
    scale, bias = np.ones(node.shape[-1]), np.float64(node.arrays.get("bias", 0.0))
    for each in chain:
        if each.op == "affine":
            scale = scale * each.arrays["scale"]
            bias = bias * each.arrays["scale"] + each.arrays["offset"]
    levels = node.kernel.levels * np.where(scale < 0, -1, 1).astype(np.int8)
    step = np.abs(scale) * node.kernel.step
    return Step(node, last.name, levels, step, bias + np.zeros(node.shape[-1]), *bounds)


def streams(steps: Sequence[Step]) -> tuple[str, ...]:
    """Returns the tensors whose ranges `plan` needs."""
    takers = _takers(steps)
    return tuple(name for name, found in takers.items() if found and _own_levels(found) is None)


def plan(steps: tuple[Step, ...], ranges: Mapping[str, tuple[float, float]]) -> Plan:
    """Returns how to store the tensors.

    Args:
      steps: from `fold`.
      ranges: tensor -> least and greatest value on training images, for those in `streams`.
    """
    storage = {}
    made = {step.output: step for step in steps}
    for name, takers in _takers(steps).items():
        own, step = _own_levels(takers), made.get(name)
        if own is not None:
            storage[name] = _bounded(_stored_at(own), step)
        elif takers and step and step.node.op in FROM_0_TO_1:
            storage[name] = GATE
        elif takers:
            storage[name] = _bounded(_stream(ranges[name], takers), step)
    several = set(streams(steps))
    for step in steps:
        if step.node.op in SAME_LEVELS:
            (name,) = step.node.inputs
            storage[step.output] = storage[name]
            several |= {step.output} if name in several else set()
    return Plan(steps, storage, frozenset(several))


def _bounded(storage: Storage, step: Step | None) -> Storage:
    """Returns the levels that a ReLU leaves: from that of 0, perhaps to that of 6."""
    if step is None or step.least < 0:
        return storage
    high = storage.zero + round(min(step.most / storage.step, HIGHEST))
    return storage._replace(low=max(storage.low, storage.zero), high=min(storage.high, high))


def _takers(steps: Sequence[Step]) -> dict[str, list[Node]]:
    """Returns, for each tensor that is computed, the nodes that take its values."""
    users: dict[str, list[Step]] = {}
    for step in steps:
        for name in step.node.inputs:
            users.setdefault(name, []).append(step)

    def takers(name: str) -> Iterator[Node]:
        for user in users.get(name, []):
            if user.node.op in SAME_LEVELS:
                yield from takers(user.output)
            else:
                yield user.node

    computed = [IMAGE, *(step.output for step in steps if step.node.op not in SAME_LEVELS)]
    return {name: list(takers(name)) for name in computed}


def _own_levels(takers: Sequence[Node]) -> Quantizer | None:
    """Returns the quantizer at whose levels a tensor is stored; None: it is a stream."""
    quantizers = {node.quantizer for node in takers}
    if len(quantizers) != 1:
        return None
    (quantizer,) = quantizers
    if quantizer is None or (quantizer.shift and quantizer.bits < CONTAINER_BITS):
        return None
    return quantizer


def _stored_at(quantizer: Quantizer) -> Storage:
    """Returns the levels of a layer's input; at 8 bits 0 is a level, even of a shifted one."""
    if quantizer.shift:
        return Storage(quantizer.step, round(quantizer.shift / quantizer.step))
    return levels_of(quantizer)


def levels_of(quantizer: Quantizer) -> Storage:
    """Returns the levels of a layer's input plus its shift: from 0, signed ones around 128."""
    zero = 128 if quantizer.signed else 0
    low, high = quantizer.bounds
    return Storage(quantizer.step, zero, zero + low, zero + high)


def _stream(bounds: tuple[float, float], takers: Sequence[Node]) -> Storage:
    """Returns 256 levels over a range.

    Where something starts at -x, x is a number of steps. Otherwise the coarsest step of the layers
    that take the tensor is an odd number of steps, so that rounding twice is rounding once.
    """
    least, most = min(bounds[0], 0.0), max(bounds[1], 0.0)
    starts = {GATE_FROM for node in takers if node.op in GATES}
    starts |= {node.quantizer.shift for node in takers if node.quantizer} - {0.0}
    if len(starts) == 1:
        (start,) = starts
        zero = min(max(1, round(HIGHEST * start / (start + most))), HIGHEST)
        return Storage(start / zero, zero)
    step = (most - least) / HIGHEST or 1.0
    coarsest = max((node.quantizer.step for node in takers if node.quantizer), default=0.0)
    if coarsest >= step:
        odd = int(coarsest / step)
        step = coarsest / (odd - 1 + odd % 2)
    return Storage(step, round(-least / step))
