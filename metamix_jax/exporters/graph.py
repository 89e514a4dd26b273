"""An exported network: a list of nodes over named tensors; needs only NumPy.

Tensors are float32 [n, ...], mostly [n, height, width, channels]; every node outputs one tensor, of
the node's name, from earlier ones. A layer (`conv`, `dense`) quantizes its input to levels,
integers q that represent q * step - shift, multiplies them by its kernel's levels and returns real
values; `product` does so with two inputs. The operations of general networks, in operations.py,
take tensors of any number of axes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from metamix_jax.exporters.operations import OPERATIONS, require

IMAGE = "image"  # the input tensor, normalized

# op -> number of inputs; None: one or more
OPS = {
    "conv": 1,
    "dense": 1,
    "affine": 1,  # x * scale + offset per channel: batch norm with running statistics
    "relu": 1,
    "relu6": 1,
    "hswish": 1,  # x * relu6(x + 3) / 6
    "hsigmoid": 1,  # relu6(x + 3) / 6
    "mean": 1,  # over positions, -> [n, 1, 1, channels]
    "flatten": 1,
    "max_pool": 1,
    "subsample": 1,  # every stride-th position; missing channels are zero-padded
    "product": 2,  # of matrices, the last two axes
} | {name: operation.inputs for name, operation in OPERATIONS.items()}
Padding = tuple[tuple[int, int], tuple[int, int]]  # (before, after) of height and width


class Quantizer(NamedTuple):
    """Real x -> level round(clip((x + shift) / step)), half to even; level q -> q * step - shift.

    Levels are 0 .. 2^bits - 1, or -(2^(bits-1) - 1) .. 2^(bits-1) - 1 if signed.
    """

    bits: int
    signed: bool
    step: float  # real units per level, a float32 value
    shift: float

    @property
    def bounds(self) -> tuple[int, int]:
        """The lowest and the highest level."""
        high = (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1
        return (-high if self.signed else 0), high


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A layer's quantized kernel; levels * step is the kernel in real units.

    levels: int8 [k, k, channels / groups, features]; dense: [channels, features].
    step: float32 [features], real units per level.
    """

    bits: int
    levels: np.ndarray
    step: np.ndarray


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation.

    options: conv: `stride`, `groups`, `padding`; max_pool: `size`, `stride`, `padding`; subsample:
      `stride`, `channels` (zeros before, after).
    arrays: float32 [channels]; layers: optional `bias`; affine: `scale`, `offset`.
    quantizer: of a layer's input; None if the image is not quantized (image_bits=32).
    other: of a product's second input.
    shape: of the output without the batch, [height, width, channels] or [channels].
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    quantizer: Quantizer | None = None
    kernel: Kernel | None = None
    other: Quantizer | None = None


@dataclasses.dataclass(frozen=True)
class Graph:
    """A network and its input format; the last node outputs the class scores.

    mean, std: of pixels in [0, 1], per channel or one for all.
    policy: the content of policy.json.
    """

    model: str
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    policy: Mapping[str, Any]
    nodes: tuple[Node, ...]

    @property
    def layers(self) -> tuple[Node, ...]:
        """The nodes with a kernel."""
        return tuple(node for node in self.nodes if node.kernel is not None)

    @property
    def general(self) -> bool:
        """Whether it needs more than the operations of a convolutional network.

        Those take images, [height, width, channels], and features, [channels].
        """
        both = {"add", "multiply", "sigmoid"}
        return any(
            node.op in OPERATIONS.keys() - both or node.op == "product"
            or len(node.shape) not in (1, 3) or (node.op == "dense" and len(node.shape) == 3)
            for node in self.nodes
        )  # fmt: skip

    def shape_of(self, tensor: str) -> tuple[int, ...]:
        """Returns a tensor's shape without the batch."""
        if tensor == IMAGE:
            return self.image_shape
        return next(node.shape for node in self.nodes if node.name == tensor)


def normalise(pixels: np.ndarray, graph: Graph) -> np.ndarray:
    """Returns the network's float32 input for uint8 pixels [n, h, w, c]."""
    mean, std = np.float32(graph.mean), np.float32(graph.std)
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def result_shape(node: Node, inputs: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the shape of a node's output from those of its inputs, all without the batch.

    Raises:
      ValueError, LookupError or TypeError: inputs, options, kernel and arrays are inconsistent.
    """
    if node.op in OPERATIONS:
        return OPERATIONS[node.op].shape(node, inputs)
    first, options = inputs[0], node.options
    if node.op == "conv":
        size, width, channels, features = node.kernel.levels.shape
        require(width == size and channels * options["groups"] == first[2])
        require(features % options["groups"] == 0)
        shape = (*_windows(first, size, options), features)
    elif node.op == "dense":
        channels, features = node.kernel.levels.shape
        require(first[-1:] == (channels,))
        shape = (*first[:-1], features)
    elif node.op == "product":
        second = inputs[1]
        require(len(first) >= 2 and first[:-2] == second[:-2] and first[-1] == second[-2])
        shape = (*first[:-1], second[-1])
    elif node.op == "max_pool":
        shape = (*_windows(first, options["size"], options), first[2])
    elif node.op == "subsample":
        stride, (before, after) = options["stride"], options["channels"]
        require(stride >= 1 and 0 <= before <= first[2] and 0 <= after <= first[2])
        shape = (-(-first[0] // stride), -(-first[1] // stride), before + first[2] + after)
    elif node.op == "mean":
        shape = (1, 1, first[2])
    elif node.op == "flatten":
        shape = (math.prod(first),)
    else:
        shape = first
    if node.op == "affine":
        require(node.arrays.keys() == {"scale", "offset"})
    arrays = [*node.arrays.values(), *([node.kernel.step] if node.kernel else [])]
    require(all(array.shape == shape[-1:] for array in arrays))
    return shape


def _windows(shape: tuple[int, ...], size: int, options: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the number of windows of `size` along height and width."""
    stride, padding = options["stride"], options["padding"]
    require(stride >= 1 and all(0 <= margin < size for pair in padding for margin in pair))
    sides = [side + sum(pair) - size for side, pair in zip(shape[:2], padding, strict=True)]
    require(min(sides) >= 0)
    return sides[0] // stride + 1, sides[1] // stride + 1
