"""Finds batch norm, activation functions, gates and means among the operations of a network.

A lowered network computes them step by step, from constants. Whole, they are what a reader of the
graph, converters and integer kernels expect.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from metamix_jax.exporters.graph import IMAGE, Node
from metamix_jax.exporters.patterns import with_patterns

_AFFINE: Mapping[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "add": lambda c: (np.ones_like(c), c),
    "subtract": lambda c: (np.ones_like(c), -c),
    "multiply": lambda c: (c, np.zeros_like(c)),
    "divide": lambda c: (1 / c, np.zeros_like(c)),
}
LAYERS = ("conv", "dense")
_CLOSE = 1e-6
Pair = tuple[int, int]


def recognised(nodes: Sequence[Node], image_shape: tuple[int, ...]) -> tuple[Node, ...]:
    """Returns nodes that compute the same, of as few kinds of operations as it can tell."""
    finder = _Finder(image_shape)
    for node in with_patterns(nodes):
        finder.visit(node)
    return _named(_joined(_needed(list(finder.found.values()))))


class _Finder:
    """Rewrites nodes one by one; `found` holds them by name."""

    def __init__(self, image_shape: tuple[int, ...]):
        self.found: dict[str, Node] = {}
        self._image_shape = tuple(image_shape)
        self._constants: dict[str, np.ndarray] = {}

    def visit(self, node: Node) -> None:
        """Adds a node, perhaps as another."""
        if node.op == "constant":
            value = np.float64(node.arrays["value"])
            self._constants[node.name] = value.reshape(node.options["shape"])
        values = [self._constants.get(name) for name in node.inputs]
        if len(values) == 2 and (values[0] is None) != (values[1] is None):
            node = self._with_constant(node, values)
        elif node.op == "multiply" and (x := self._gated(node)):
            node = dataclasses.replace(node, op="hswish", inputs=(x,))
        elif node.op == "reshape" and node.shape == self._shape(node.inputs[0])[-1:]:
            node = dataclasses.replace(node, op="flatten", options={})
        elif node.op in _WINDOWS:
            options = _WINDOWS[node.op](**node.options)
            if options is not None and len(node.shape) == 3 and self._is_whole(node, options):
                op = "max_pool" if node.op == "max_window" else "subsample"
                node = dataclasses.replace(node, op=op, options=options)
        self.found[node.name] = node

    def _with_constant(self, node: Node, values: list[np.ndarray | None]) -> Node:
        first = values[0] is None  # x comes first
        x, constant = node.inputs[0 if first else 1], values[1 if first else 0]
        before = self.found.get(x)
        if constant.size == 1:
            number = float(constant.ravel()[0])
            if node.op == "maximum" and number == 0:
                return dataclasses.replace(node, op="relu", inputs=(x,))
            if node.op == "minimum" and number == 6 and before and before.op == "relu":
                return dataclasses.replace(node, op="relu6", inputs=before.inputs)
            sixth = {"divide": 1 / 6, "multiply": 6.0}.get(node.op, np.nan) * number
            if first and abs(sixth - 1) < _CLOSE and before and before.op == "relu6":
                moved = self.found[before.inputs[0]]
                if moved.op == "affine" and _is(moved, 1.0, 3.0):
                    return dataclasses.replace(node, op="hsigmoid", inputs=moved.inputs)
        per_channel = bool(node.shape) and constant.size in (1, node.shape[-1])
        if node.op not in _AFFINE or not per_channel or node.shape != self._shape(x):
            return node
        if constant.size > 1 and constant.shape[-1] != constant.size:
            return node  # along another axis
        if not first and node.op == "divide":
            return node
        scale, offset = _AFFINE[node.op](np.broadcast_to(constant.ravel(), node.shape[-1:]))
        if not first and node.op == "subtract":
            scale, offset = -scale, -offset
        total = self._sum_of_positions(x)
        if total and np.allclose(scale * np.prod(self._shape(total.inputs[0])[:2]), 1, atol=_CLOSE):
            return self._mean(node, total)
        arrays = {"scale": np.float32(scale), "offset": np.float32(offset)}
        return dataclasses.replace(node, op="affine", inputs=(x,), arrays=arrays)

    def _mean(self, node: Node, total: Node) -> Node:
        """Returns the mean over positions in place of `node`, which divides their sum."""
        mean = Node("mean", node.name, total.inputs, (1, 1, node.shape[-1]))
        if node.shape == mean.shape:
            return mean
        mean = dataclasses.replace(mean, name=f"{node.name}_mean")
        self.found[mean.name] = mean
        return Node("flatten", node.name, (mean.name,), node.shape)

    def _sum_of_positions(self, name: str) -> Node | None:
        """Returns the node that sums over height and width, if this is its result, or reshaped."""
        node = self.found.get(name)
        if node and node.op == "reshape" and node.shape[:-1] == (1, 1):
            node = self.found.get(node.inputs[0])
        whole = node and node.op == "sum" and tuple(node.options["axes"]) == (0, 1)
        return node if whole and len(self._shape(node.inputs[0])) == 3 else None

    def _gated(self, node: Node) -> str:
        """Returns x, if a node is x times its own hard sigmoid."""
        for x, gate in (node.inputs, reversed(node.inputs)):
            found = self.found.get(gate)
            if found and found.op == "hsigmoid" and found.inputs == (x,):
                return x
        return ""

    def _is_whole(self, node: Node, options: Mapping[str, Any]) -> bool:
        """Returns whether a slice takes every k-th position of all, and all channels."""
        height, width, channels = self._shape(node.inputs[0])
        stride = options["stride"]
        wanted = -(-height // stride), -(-width // stride), channels
        return node.op != "slice" or node.shape == wanted

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._image_shape if name == IMAGE else self.found[name].shape


def _joined(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Returns nodes in which each chain of scales and offsets, or of subsampling, is one.

    A chain is named after its module. What only adds to a layer's output becomes its bias.
    """
    uses = collections.Counter(name for node in nodes for name in node.inputs)
    given = {node.name for node in nodes}
    found: dict[str, Node] = {}
    names: dict[str, str] = {}  # of tensors that have another name now
    for node in nodes:
        node = dataclasses.replace(node, inputs=tuple(names.get(x, x) for x in node.inputs))
        before = found.get(node.inputs[0]) if node.inputs else None
        name = node.name
        op = before.op if before and uses[before.name] == 1 else ""  # "": nothing joins it
        if op in LAYERS and node.op == "affine" and _only_adds(node, nodes):
            arrays = {"bias": node.arrays["offset"]}
            node = dataclasses.replace(before, arrays=arrays)
        elif node.op == op == "affine":
            del found[before.name]
            node = dataclasses.replace(node, inputs=before.inputs, arrays=_chained(before, node))
            module = name.rpartition(":")[0]
            if module and module not in given | found.keys():
                node = dataclasses.replace(node, name=module)
        elif node.op == op == "subsample" and before.options["channels"] == (0, 0):
            del found[before.name]
            stride = before.options["stride"] * node.options["stride"]
            options = {**node.options, "stride": stride}
            node = dataclasses.replace(node, inputs=before.inputs, options=options)
        found[node.name], names[name] = node, node.name
        uses[node.name] = uses[name]
    return tuple(found.values())


def _only_adds(node: Node, nodes: Sequence[Node]) -> bool:
    """Returns whether all that a chain of scales and offsets does is to add what this node adds."""
    after = [each for each in nodes if node.name in each.inputs]
    alone = len(after) != 1 or after[0].op != "affine"
    return alone and bool(np.all(node.arrays["scale"] == 1))


def _named(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Returns nodes whose names say what they are, in the module that they come from."""
    taken = {node.name for node in nodes if node.op in (*LAYERS, "product", "affine")}
    names = {name: name for name in taken}
    named = []
    for node in nodes:
        if node.name not in names:
            module = node.name.rpartition(":")[0]
            first = name = f"{module}:{node.op}".lstrip(":")
            number = 1
            while name in taken:
                number += 1
                name = f"{first}_{number}"
            taken.add(name)
            names[node.name] = name
        inputs = tuple(names.get(x, x) for x in node.inputs)
        named.append(dataclasses.replace(node, name=names[node.name], inputs=inputs))
    return tuple(named)


def _needed(nodes: Sequence[Node]) -> list[Node]:
    """Returns the nodes that the last one depends on."""
    wanted = {nodes[-1].name}
    for node in reversed(nodes):
        wanted |= set(node.inputs) if node.name in wanted else set()
    return [node for node in nodes if node.name in wanted]


def _chained(first: Node, second: Node) -> dict[str, np.ndarray]:
    """Returns the scale and offset of two nodes in a row."""
    scale = np.float64(first.arrays["scale"]) * second.arrays["scale"]
    offset = np.float64(first.arrays["offset"]) * second.arrays["scale"] + second.arrays["offset"]
    return {"scale": np.float32(scale), "offset": np.float32(offset)}


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
