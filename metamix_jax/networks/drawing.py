"""How a network says what lies between its layers, for export."""

from typing import Any, Protocol

IMAGE = "image"  # the tensor that comes in, normalised


class Drawing(Protocol):
    """Where the nodes go, see exporters/build.py; each call returns the name of a tensor.

    What a layer is (stride, padding, shift, shapes, ...) comes from the network's own modules.
    """

    def has(self, path: str) -> bool:
        """Whether the network has a layer of this path."""

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Returns a tensor's shape without the batch."""

    def layer(self, tensor: str, path: str, norm: str = "", activation: str = "") -> str:
        """A layer, and what follows it: batch norm of path `norm`, an operation without options."""

    def node(self, op: str, *tensors: str, **options: Any) -> str:
        """An operation."""
