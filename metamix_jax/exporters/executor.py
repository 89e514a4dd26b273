"""The reference executor: runs an exported network layer by layer in plain NumPy.

Every convolution and dense layer multiplies integers by integers. NumPy's integer matmul is slow,
so the integers go through BLAS as floats, which is exact: the kernel bounds a layer's accumulators
(`_accumulator_bound`), float32 is used only below 2^24, float64 otherwise, and accumulators must
fit int32. Values between layers are float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from metamix_jax.exporters.graph import IMAGE, Graph, Node, Padding, Quantizer
from metamix_jax.exporters.operations import OPERATIONS, Arrays

LevelsHook = Callable[[Node, np.ndarray], np.ndarray]


def run(graph: Graph, images: np.ndarray, on_levels: LevelsHook | None = None) -> np.ndarray:
    """Returns class scores [n, num_classes] of normalized float32 images [n, h, w, c].

    on_levels: called with each layer and its input's levels [n, ...]; returns the levels to use.
    """

    def layer(node: Node, x: np.ndarray) -> np.ndarray:
        if node.quantizer is None:  # an unquantized image, the only float operand of a product
            return _rescaled(node, _product(node, x, np.float64))
        levels = quantize(x, node.quantizer)
        levels = on_levels(node, levels) if on_levels else levels
        return real_output(node, integer_product(node, levels), x.shape[1:])

    return evaluate(graph, images, np, layer, matrix_product)


def evaluate(
    graph: Graph,
    images: Any,
    arrays: Arrays,
    layer: Callable[[Node, Any], Any],
    product: Callable[[Node, Any, Any], Any],
) -> Any:
    """Returns class scores, node by node, with NumPy or JAX.

    Args:
      graph: the network.
      images: normalized, float32 [n, h, w, c].
      arrays: the module numpy or jax.numpy.
      layer: (node, input) -> output of a convolution or dense layer.
      product: (node, *inputs) -> output of a product of two inputs.
    """
    tensors = {IMAGE: images}
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    for i, node in enumerate(graph.nodes):
        inputs = [tensors[name] for name in node.inputs]
        if node.kernel is not None:
            tensors[node.name] = layer(node, *inputs)
        elif node.op == "product":
            tensors[node.name] = product(node, *inputs)
        elif node.op in OPERATIONS:
            tensors[node.name] = OPERATIONS[node.op].run(arrays, node, *inputs)
        else:
            tensors[node.name] = CONVOLUTIONAL[node.op](arrays, node, *inputs)
        for name in node.inputs:
            if last_use[name] == i:
                tensors.pop(name, None)
    return tensors[graph.nodes[-1].name]


def quantize(x: Any, quantizer: Quantizer, arrays: Arrays = np) -> Any:
    """Returns the levels of real values, int32 of the same shape; see `Quantizer`."""
    low, high = (np.float32(bound) for bound in quantizer.bounds)
    levels = (x + np.float32(quantizer.shift)) / np.float32(quantizer.step)
    return arrays.rint(arrays.clip(levels, low, high)).astype(np.int32)


def real_output(node: Node, sums: Any, shape: tuple[int, ...]) -> Any:
    """Returns a layer's output, float32, from its accumulators.

    Args:
      node: the layer.
      sums: `integer_product` of its input's levels.
      shape: of its input, without the images.
    """
    y = sums * np.float32(node.quantizer.step)
    if node.quantizer.shift:
        # Level q represents q * step - shift, but zero padding represents 0: subtract the shift
        # times the sum of the kernel inside the image.
        y = y - np.float32(node.quantizer.shift) * ones_product(node, shape)
    return _rescaled(node, y)


def _rescaled(node: Node, y: Any) -> Any:
    y = y.astype(np.float32) * node.kernel.step
    return y + node.arrays["bias"] if "bias" in node.arrays else y


def integer_product(node: Node, levels: np.ndarray) -> np.ndarray:
    """Returns the layer's int32 accumulators for its input's levels (int32)."""
    bound = _accumulator_bound(node)
    assert bound < 2**31, f"{node.name}: accumulators up to {bound} do not fit 32 bits"
    exact = np.float32 if bound < 2**24 else np.float64
    return _product(node, levels, exact).astype(np.int32)


def ones_product(node: Node, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the layer's product with an input of ones, int32 [1, ...]."""
    return _product(node, np.ones((1, *shape)), np.float64).astype(np.int32)


def _accumulator_bound(node: Node) -> int:
    """Returns an upper bound on the magnitude of every partial sum of the layer's products."""
    kernel = np.abs(node.kernel.levels.astype(np.int64))
    return int(kernel.reshape(-1, kernel.shape[-1]).sum(axis=0).max()) * node.quantizer.bounds[1]


def _product(node: Node, x: np.ndarray, dtype: type) -> np.ndarray:
    kernel = node.kernel.levels.astype(dtype)
    if node.op == "dense":
        return x.astype(dtype) @ kernel
    options = node.options
    return _convolve(x.astype(dtype), kernel, options["stride"], options["groups"],
                     options["padding"])  # fmt: skip


def _convolve(
    x: np.ndarray, kernel: np.ndarray, stride: int, groups: int, padding: Padding
) -> np.ndarray:
    """Sums over kernel positions: [n, h, w, c], [k, k, c / groups, f] -> [n, h', w', f]."""
    size, features = kernel.shape[0], kernel.shape[-1]
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    total = np.zeros((len(x), height, width, features), x.dtype)
    for i, j in np.ndindex(size, size):
        rows, columns = places(i, height, stride), places(j, width, stride)
        total += _multiply(x[:, rows, columns], kernel[i, j], groups)
    return total


def _multiply(x: np.ndarray, kernel: np.ndarray, groups: int) -> np.ndarray:
    """Multiplies [n, h, w, c] by [c / groups, f] group by group -> [n, h, w, f]."""
    if kernel.shape == (1, groups):  # depthwise
        return x * kernel[0]
    inputs, kernels = np.split(x, groups, axis=-1), np.split(kernel, groups, axis=-1)
    parts = [part @ matrix for part, matrix in zip(inputs, kernels, strict=True)]
    return np.concatenate(parts, axis=-1) if groups > 1 else parts[0]


def places(first: int, count: int, stride: int) -> slice:
    """Returns every stride-th position, `count` of them."""
    return slice(first, first + (count - 1) * stride + 1, stride)


def _affine(arrays: Arrays, node: Node, x: Any) -> Any:
    return x * node.arrays["scale"] + node.arrays["offset"]


def _relu(arrays: Arrays, node: Node, x: Any) -> Any:
    return arrays.maximum(x, np.float32(0))


def _relu6(arrays: Arrays, node: Node, x: Any) -> Any:
    return arrays.minimum(arrays.maximum(x, np.float32(0)), np.float32(6))


def _hard_sigmoid(arrays: Arrays, node: Node, x: Any) -> Any:
    return _relu6(arrays, node, x + np.float32(3)) / np.float32(6)


def _hswish(arrays: Arrays, node: Node, x: Any) -> Any:
    return x * _hard_sigmoid(arrays, node, x)


def _mean(arrays: Arrays, node: Node, x: Any) -> Any:
    return arrays.mean(x, axis=(1, 2), keepdims=True)


def _max_pool(arrays: Arrays, node: Node, x: Any) -> Any:
    size, stride, padding = (node.options[key] for key in ("size", "stride", "padding"))
    x = arrays.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-np.float32(np.inf))
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    windows = [
        x[:, places(i, height, stride), places(j, width, stride)] for i, j in np.ndindex(size, size)
    ]
    return functools.reduce(arrays.maximum, windows)


def _subsample(arrays: Arrays, node: Node, x: Any) -> Any:
    stride, channels = node.options["stride"], node.options["channels"]
    return arrays.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), channels))


def matrix_product(node: Node, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Multiplies integers where no input is shifted, else the values that they represent."""
    left, right = quantize(x, node.quantizer), quantize(y, node.other)
    scale = np.float32(node.quantizer.step) * np.float32(node.other.step)
    if not (node.quantizer.shift or node.other.shift):
        bound = node.quantizer.bounds[1] * node.other.bounds[1] * x.shape[-1]
        exact = np.float32 if bound < 2**24 else np.float64
        return (left.astype(exact) @ right.astype(exact)).astype(np.float32) * scale
    real = [
        levels * np.float32(quantizer.step) - np.float32(quantizer.shift)
        for levels, quantizer in ((left, node.quantizer), (right, node.other))
    ]
    return (real[0].astype(np.float64) @ real[1]).astype(np.float32)


CONVOLUTIONAL = {
    "affine": _affine,
    "relu": _relu,
    "relu6": _relu6,
    "hswish": _hswish,
    "hsigmoid": _hard_sigmoid,
    "mean": _mean,
    "flatten": lambda arrays, node, x: x.reshape(len(x), -1),
    "max_pool": _max_pool,
    "subsample": _subsample,
}
