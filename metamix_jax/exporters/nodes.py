"""The nodes of a graph that is being built."""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np

from metamix_jax.exporters.graph import IMAGE, Node, result_shape

REPEATED = "@"  # NAME@2 is the second run of layer NAME


class NodeList:
    """Nodes with unique names and known shapes.

    nodes: so far.
    shapes: of every tensor, without the images.
    place: of the module at work, for names.
    """

    def __init__(self, image_shape: tuple[int, ...], images: int, layers: Collection[str]):
        self.nodes: list[Node] = []
        self.shapes = {IMAGE: tuple(image_shape)}
        self.place = ""
        self._images, self._layers = images, layers

    def add(self, op: str, *inputs: str | np.ndarray, **options: Any) -> str:
        """Adds a node unless it changes nothing; returns its name."""
        names = tuple(x if isinstance(x, str) else self._constant(x) for x in inputs)
        node = Node(op, self.unique(op), names, (), options=options)
        shape = result_shape(node, [self.shapes[name] for name in names])
        order = options.get("order", ())
        if op in ("reshape", "expand", "slice") and shape == self.shapes[names[0]]:
            return names[0]
        if op == "transpose" and order == tuple(range(1, len(order) + 1)):
            return names[0]
        return self.append(node)

    def _constant(self, value: Any) -> str:
        """Adds a constant, [1, ...] or of no axes: the same for all images."""
        array = np.asarray(value, np.float32)
        if array.ndim and array.shape[0] == self._images and not np.ptp(array, axis=0).any():
            array = array[:1]
        assert not array.ndim or array.shape[0] == 1, "constants are the same for all images"
        options = {"shape": array.shape[1:]}
        node = Node("constant", self.unique("constant"), (), (), options, {"value": array.ravel()})
        return self.append(node)

    def append(self, node: Node) -> str:
        """Adds a node with the shape that follows from its inputs; returns its name."""
        shape = result_shape(node, [self.shapes[name] for name in node.inputs])
        self.nodes.append(dataclasses.replace(node, shape=shape))
        self.shapes[node.name] = shape
        return node.name

    def unique(self, name: str) -> str:
        """Returns a name that no tensor has yet: a layer that runs again is NAME@2.

        Of an operation, it is MODULE:OPERATION, after the module that it comes from.
        """
        layer = name in self._layers
        name = name if layer else f"{self.place}:{name}".lstrip(":")
        if name not in self.shapes and (layer or name not in self._layers):
            return name
        mark, number = REPEATED if layer else "_", 2
        while f"{name}{mark}{number}" in self.shapes:
            number += 1
        return f"{name}{mark}{number}"
