"""How a network describes the operations between its layers, for export."""

from typing import Any, Protocol

IMAGE = "image"  # the input tensor, normalized


class Drawing(Protocol):
    """Collects nodes, see exporters/build.py; `layer` and `node` return the output tensor's name.

    The properties of a layer (stride, padding, shift, shapes, ...) come from the network's modules.
    """

    def has(self, path: str) -> bool:
        """Returns whether the network has a layer at `path`."""

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Returns a tensor's shape without the batch."""

    def layer(self, tensor: str, path: str, norm: str = "", activation: str = "") -> str:
        """Adds a layer, then batch norm at path `norm` and an activation, unless empty."""

    def node(self, op: str, *tensors: str, **options: Any) -> str:
        """Adds an operation."""
