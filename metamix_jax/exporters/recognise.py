"""Finds batch norm, ReLUs, gates and means among the operations of a traced network.

A traced graph computes them step by step, from constants; integer kernels want them whole.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from metamix_jax.exporters.graph import Graph, Node

_AFFINE: Mapping[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "add": lambda c: (np.ones_like(c), c),
    "subtract": lambda c: (np.ones_like(c), -c),
    "multiply": lambda c: (c, np.zeros_like(c)),
    "divide": lambda c: (1 / c, np.zeros_like(c)),
}
_CLOSE = 1e-6
Pair = tuple[int, int]


def recognised(graph: Graph) -> Graph:
    """Returns a graph with the same tensors, of as few kinds of operations as it can tell."""
    finder = _Finder()
    for node in graph.nodes:
        finder.visit(node)
    return dataclasses.replace(graph, nodes=tuple(finder.nodes))


class _Finder:
    """Rewrites nodes one by one; `nodes` are those that are still needed, in order."""

    def __init__(self) -> None:
        self._found: dict[str, Node] = {}
        self._constants: dict[str, np.ndarray] = {}

    @property
    def nodes(self) -> list[Node]:
        """The nodes that the last one depends on."""
        wanted = {list(self._found)[-1]}
        for name in reversed(self._found):
            wanted |= set(self._found[name].inputs) if name in wanted else set()
        return [node for name, node in self._found.items() if name in wanted]

    def visit(self, node: Node) -> None:
        """Adds a node, perhaps as another."""
        if node.op == "constant":
            value = np.float64(node.arrays["value"])
            self._constants[node.name] = value.reshape(node.options["shape"])
        values = [self._constants.get(name) for name in node.inputs]
        if len(values) == 2 and (values[0] is None) != (values[1] is None):
            node = self._with_constant(node, values)
        elif node.op == "reshape" and self._summed(node.inputs[0]):
            total = self._found[node.inputs[0]]
            node = dataclasses.replace(total, name=node.name, shape=node.shape)
        elif node.op == "reshape" and node.shape == self._shape(node)[-1:]:
            node = dataclasses.replace(node, op="flatten", options={})
        elif node.op in _WINDOWS:
            options = _WINDOWS[node.op](**node.options)
            if options is not None and len(node.shape) == 3 and self._is_whole(node, options):
                op = "max_pool" if node.op == "max_window" else "subsample"
                node = dataclasses.replace(node, op=op, options=options)
        self._found[node.name] = node

    def _with_constant(self, node: Node, values: list[np.ndarray | None]) -> Node:
        first = values[0] is None  # x comes first
        x, constant = node.inputs[0 if first else 1], values[1 if first else 0]
        before = self._found.get(x)
        if constant.size == 1:
            number = float(constant.ravel()[0])
            if node.op == "maximum" and number == 0:
                return dataclasses.replace(node, op="relu", inputs=(x,))
            if node.op == "minimum" and number == 6 and before and before.op == "relu":
                return dataclasses.replace(node, op="relu6", inputs=before.inputs)
            sixth = {"divide": 1 / 6, "multiply": 6.0}.get(node.op, np.nan) * number
            if first and abs(sixth - 1) < _CLOSE and before and before.op == "relu6":
                moved = self._found[before.inputs[0]]
                if moved.op == "affine" and _is(moved, 1.0, 3.0):
                    return dataclasses.replace(node, op="hsigmoid", inputs=moved.inputs)
        if node.op not in _AFFINE or constant.size not in (1, node.shape[-1]):
            return node
        if constant.size > 1 and constant.shape[-1] != constant.size:
            return node  # along another axis
        if not first and node.op == "divide":
            return node
        scale, offset = _AFFINE[node.op](np.broadcast_to(constant.ravel(), node.shape[-1:]))
        if not first and node.op == "subtract":
            scale, offset = -scale, -offset
        if (count := self._summed(x)) and np.allclose(scale * count, 1, atol=_CLOSE):
            return dataclasses.replace(before, op="mean", name=node.name, options={})
        arrays = {"scale": scale, "offset": offset}
        return dataclasses.replace(node, op="affine", inputs=(x,), arrays=arrays)

    def _summed(self, name: str) -> int:
        """Returns of how many positions a tensor is the sum; 0 if it is not one of all."""
        node = self._found.get(name)
        if node is None or node.op != "sum" or tuple(node.options["axes"]) != (0, 1):
            return 0
        height, width, *channels = self._shape(node)
        return height * width if len(channels) == 1 else 0

    def _is_whole(self, node: Node, options: Mapping[str, Any]) -> bool:
        """Returns whether a slice takes every k-th position of all, and all channels."""
        height, width, channels = self._shape(node)
        stride = options["stride"]
        wanted = -(-height // stride), -(-width // stride), channels
        return node.op != "slice" or node.shape == wanted

    def _shape(self, node: Node) -> tuple[int, ...]:
        found = self._found.get(node.inputs[0])
        return found.shape if found else ()


def _pooled(size: Pair, strides: Pair, padding: tuple[Pair, Pair]) -> Mapping[str, Any] | None:
    """Returns the options of max_pool; None if the window or the stride is not square."""
    if size[0] != size[1] or strides[0] != strides[1]:
        return None
    return {"size": size[0], "stride": strides[0], "padding": padding}


def _strided(bounds: tuple[tuple[int, int, int], ...]) -> Mapping[str, Any] | None:
    """Returns the options of subsample for every k-th position; None for other slices."""
    starts, _, strides = zip(*bounds, strict=True)
    if any(starts) or len(strides) != 3 or strides[0] != strides[1] or strides[2] != 1:
        return None
    return {"stride": strides[0], "channels": (0, 0)}


def _padded(margins: tuple[Pair, ...], value: float) -> Mapping[str, Any] | None:
    """Returns the options of subsample for channels of zeros; None for other padding."""
    if value or any(side for pair in margins[:-1] for side in pair):
        return None
    return {"stride": 1, "channels": margins[-1]}


_WINDOWS = {"max_window": _pooled, "slice": _strided, "pad": _padded}


def _is(node: Node, scale: float, offset: float) -> bool:
    arrays = node.arrays
    return bool(np.all(arrays["scale"] == scale) and np.all(arrays["offset"] == offset))
