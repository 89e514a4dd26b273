"""The reference executor: runs an exported network layer by layer in plain NumPy.

Every convolution and dense layer multiplies integers by integers. NumPy's integer matmul is slow,
so the integers go through BLAS as floats, which is exact: the kernel bounds a layer's accumulators
(`_accumulator_bound`), float32 is used only below 2^24, float64 otherwise, and accumulators must
fit int32. Values between layers are float32.
"""

from collections.abc import Callable

import numpy as np

from metamix_jax.exporters.graph import IMAGE, Graph, Node, Padding, Quantizer
from metamix_jax.exporters.operations import OPERATIONS

LevelsHook = Callable[[Node, np.ndarray], np.ndarray]


def run(graph: Graph, images: np.ndarray, on_levels: LevelsHook | None = None) -> np.ndarray:
    """Returns class scores [n, num_classes] of normalized float32 images [n, h, w, c].

    on_levels: called with each layer and its input's levels [n, ...]; returns the levels to use.
    """
    tensors = {IMAGE: images}
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    for i, node in enumerate(graph.nodes):
        inputs = [tensors[name] for name in node.inputs]
        if node.kernel is not None:
            tensors[node.name] = _layer(node, *inputs, on_levels)
        elif node.op == "product":
            tensors[node.name] = matrix_product(node, *inputs)
        elif node.op in OPERATIONS:
            tensors[node.name] = OPERATIONS[node.op].run(node, *inputs)
        else:
            tensors[node.name] = CONVOLUTIONAL[node.op](node, *inputs)
        for name in node.inputs:
            if last_use[name] == i:
                tensors.pop(name, None)
    return tensors[graph.nodes[-1].name]


def quantize(x: np.ndarray, quantizer: Quantizer) -> np.ndarray:
    """Returns the levels of real values, int32 of the same shape; see `Quantizer`."""
    low, high = (np.float32(bound) for bound in quantizer.bounds)
    levels = np.clip((x + np.float32(quantizer.shift)) / np.float32(quantizer.step), low, high)
    return np.rint(levels).astype(np.int32)


def _layer(node: Node, x: np.ndarray, on_levels: LevelsHook | None) -> np.ndarray:
    quantizer, kernel = node.quantizer, node.kernel
    if quantizer is None:  # an unquantized image, the only float operand of a product
        y = _product(node, x, np.float64).astype(np.float32)
    else:
        levels = quantize(x, quantizer)
        levels = on_levels(node, levels) if on_levels else levels
        y = integer_product(node, levels) * np.float32(quantizer.step)
        if quantizer.shift:
            # Level q represents q * step - shift, but zero padding represents 0: subtract the shift
            # times the sum of the kernel inside the image.
            y = y - np.float32(quantizer.shift) * ones_product(node, x.shape[1:])
    y = y.astype(np.float32) * kernel.step
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
        rows, columns = _places(i, height, stride), _places(j, width, stride)
        total += _multiply(x[:, rows, columns], kernel[i, j], groups)
    return total


def _multiply(x: np.ndarray, kernel: np.ndarray, groups: int) -> np.ndarray:
    """Multiplies [n, h, w, c] by [c / groups, f] group by group -> [n, h, w, f]."""
    if kernel.shape == (1, groups):  # depthwise
        return x * kernel[0]
    inputs, kernels = np.split(x, groups, axis=-1), np.split(kernel, groups, axis=-1)
    parts = [part @ matrix for part, matrix in zip(inputs, kernels, strict=True)]
    return np.concatenate(parts, axis=-1) if groups > 1 else parts[0]


def _places(first: int, count: int, stride: int) -> slice:
    return slice(first, first + (count - 1) * stride + 1, stride)


def _affine(node: Node, x: np.ndarray) -> np.ndarray:
    return x * node.arrays["scale"] + node.arrays["offset"]


def _relu6(x: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x, np.float32(0)), np.float32(6))


def _hard_sigmoid(x: np.ndarray) -> np.ndarray:
    return _relu6(x + np.float32(3)) / np.float32(6)


def _max_pool(node: Node, x: np.ndarray) -> np.ndarray:
    size, stride, padding = (node.options[key] for key in ("size", "stride", "padding"))
    x = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-np.inf)
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    windows = (
        x[:, _places(i, height, stride), _places(j, width, stride)]
        for i, j in np.ndindex(size, size)
    )
    greatest = next(windows)
    for window in windows:
        greatest = np.maximum(greatest, window)
    return greatest


def _subsample(node: Node, x: np.ndarray) -> np.ndarray:
    stride = node.options["stride"]
    return np.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), node.options["channels"]))


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
    "relu": lambda node, x: np.maximum(x, np.float32(0)),
    "relu6": lambda node, x: _relu6(x),
    "hswish": lambda node, x: x * _hard_sigmoid(x),
    "hsigmoid": lambda node, x: _hard_sigmoid(x),
    "mean": lambda node, x: np.mean(x, axis=(1, 2), keepdims=True),
    "flatten": lambda node, x: x.reshape(len(x), -1),
    "max_pool": _max_pool,
    "subsample": _subsample,
}
