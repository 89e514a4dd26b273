"""Finds softmax, GELU and layer norm, which a lowered network computes step by step.

A pattern is written as the operations are: an `Apply` of an operation to patterns. Inside, a
string is any tensor, the same wherever it recurs, and a number is a constant of that value.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metamix_jax.exporters.graph import Node

_COMMUTATIVE = frozenset({"add", "multiply", "maximum"})
_CLOSE = 1e-6
Pattern = Any
Nodes = Mapping[str, Node]
Facts = dict[str, Node | str]  # what the names of a pattern stand for


class Apply(NamedTuple):
    """An operation whose inputs fit patterns."""

    op: str
    inputs: tuple[Pattern, ...]


class OverLast(NamedTuple):
    """A reduction over the last axis."""

    op: str
    x: Pattern


class Constant(NamedTuple):
    """A constant of any value."""

    name: str


def with_patterns(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Returns nodes that compute the same, each pattern in one; those no longer needed stay."""
    found = {node.name: node for node in nodes}
    return tuple(_whole(node, found) for node in nodes)


def _whole(node: Node, nodes: Nodes) -> Node:
    for pattern, make in _PATTERNS:
        for facts in _fits(pattern, node.name, nodes, {}):
            made = make(node, facts)
            if made is not None:
                return made
    return node


def _fits(pattern: Pattern, name: str, nodes: Nodes, facts: Facts) -> Iterator[Facts]:
    """Yields the facts of every way in which a pattern fits a tensor."""
    node = nodes.get(name)
    if isinstance(pattern, str):
        if facts.get(pattern, name) == name:
            yield facts | {pattern: name}
    elif node is None:  # the image
        return
    elif isinstance(pattern, float):
        if node.op == "constant" and np.allclose(node.arrays["value"], pattern, rtol=_CLOSE):
            yield facts
    elif isinstance(pattern, Constant):
        if node.op == "constant":
            yield facts | {pattern.name: node}
    elif node.op != pattern.op:
        return
    elif isinstance(pattern, OverLast):
        if node.options["axes"] == (len(node.shape),):
            yield from _fits(pattern.x, node.inputs[0], nodes, facts)
    else:
        orders = [node.inputs, node.inputs[::-1]] if node.op in _COMMUTATIVE else [node.inputs]
        for inputs in orders:
            yield from _fit_all(pattern.inputs, inputs, nodes, facts)


def _fit_all(
    patterns: Sequence[Pattern], names: Sequence[str], nodes: Nodes, facts: Facts
) -> Iterator[Facts]:
    if not names:
        yield facts
        return
    for found in _fits(patterns[0], names[0], nodes, facts):
        yield from _fit_all(patterns[1:], names[1:], nodes, found)


def _one(op: str, **options: Any) -> Callable[[Node, Facts], Node]:
    """Returns how to make an operation on the tensor `x` of a pattern."""

    def make(node: Node, facts: Facts) -> Node:
        return dataclasses.replace(node, op=op, inputs=(facts["x"],), options=options)

    return make


def _layer_norm(node: Node, facts: Facts) -> Node | None:
    """Returns the norm, unless its constants have other sizes than the last axis."""
    values = {
        name: found.arrays["value"] for name, found in facts.items() if isinstance(found, Node)
    }
    channels = node.shape[-1]
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    arrays = {"scale": values.get("scale", ones), "offset": values.get("offset", zeros)}
    numbers = [values[name].tolist() for name in ("count", "count of squares")]
    if numbers != [[channels]] * 2 or values["epsilon"].size != 1:
        return None
    if any(array.size != channels for array in arrays.values()):
        return None
    options = {"epsilon": float(values["epsilon"].item())}
    made = _one("layer_norm", **options)(node, facts)
    return dataclasses.replace(made, arrays=arrays)


def _put_back(x: Pattern) -> Apply:  # the axis that a reduction took away
    return Apply("reshape", (x,))


def _times(*factors: Pattern) -> Apply:
    return Apply("multiply", factors)


_POWERS = Apply("exp", (Apply("subtract", ("x", _put_back(OverLast("greatest", "x")))),))
_SOFTMAX = Apply("divide", (_POWERS, _put_back(OverLast("sum", _POWERS))))

_ERF = Apply("erf", (_times(Apply("negate", ("x",)), math.sqrt(0.5)),))
_GELU = _times(_times(0.5, "x"), Apply("subtract", (1.0, _ERF)))
_CUBIC = Apply("add", ("x", _times(0.044715, _times(_times("x", "x"), "x"))))
_TANH = Apply("tanh", (_times(math.sqrt(2 / math.pi), _CUBIC),))
_TANH_GELU = _times("x", _times(0.5, Apply("add", (1.0, _TANH))))

# Flax computes the variance as mean(x^2) - mean(x)^2, or as mean((x - mean(x))^2).
_MEAN = Apply("divide", (OverLast("sum", "x"), Constant("count")))
_CENTRED = Apply("subtract", ("x", _put_back(_MEAN)))
_VARIANCES = [
    Apply("maximum", (0.0, Apply("subtract", (mean, _times(_MEAN, _MEAN))))) if fast else mean
    for fast, x in ((True, "x"), (False, _CENTRED))
    for mean in [Apply("divide", (OverLast("sum", _times(x, x)), Constant("count of squares")))]
]
_NORMS = []
for _variance in _VARIANCES:
    _inverse = Apply("rsqrt", (Apply("add", (_put_back(_variance), Constant("epsilon"))),))
    for _factor in (_times(_inverse, Constant("scale")), _inverse):
        _normed = _times(_CENTRED, _factor)
        _NORMS += [Apply("add", (_normed, Constant("offset"))), _normed]

_PATTERNS: tuple[tuple[Pattern, Callable[[Node, Facts], Node | None]], ...] = (
    (_SOFTMAX, _one("softmax")),
    (_GELU, _one("gelu", approximate=False)),
    (_TANH_GELU, _one("gelu", approximate=True)),
    *((pattern, _layer_norm) for pattern in _NORMS),
)
