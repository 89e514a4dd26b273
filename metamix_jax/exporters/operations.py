"""Operations between the layers of a general network, on tensors [n, ...] of NumPy or JAX.

Axes, shapes and margins in a node's options leave the images' axis out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Arrays = Any  # the module numpy or jax.numpy


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation.

    run: (arrays, node, *inputs) -> output, all float32 [n, ...].
    shape: (node, shapes of the inputs) -> shape of the output, without the images; raises
      ValueError, LookupError or TypeError where they do not fit.
    inputs: how many; None: one or more.
    """

    run: Callable[..., np.ndarray]
    shape: Callable[[Any, Sequence[Shape]], Shape]
    inputs: int | None = 1


def require(condition: bool) -> None:
    """Raises ValueError if the facts of a node contradict each other."""
    if not condition:
        raise ValueError("inconsistent shapes or options")


def _elementwise(function: str | Callable[..., Any], inputs: int) -> Operation:
    def run(arrays: Arrays, node: Any, *values: Any) -> Any:
        if isinstance(function, str):
            return arrays.asarray(getattr(arrays, function)(*values), np.float32)
        return arrays.asarray(function(arrays, *values), np.float32)

    return Operation(run, lambda node, shapes: np.broadcast_shapes(*shapes), inputs)


def _erf(arrays: Arrays, x: Any) -> Any:
    if arrays is np:
        return np.vectorize(math.erf, otypes=[np.float32])(x)
    from jax.scipy import special  # the bundle can be run without JAX

    return special.erf(x)


def _sigmoid(arrays: Arrays, x: Any) -> Any:
    return np.float32(1) / (np.float32(1) + arrays.exp(-x))


def _gelu(arrays: Arrays, node: Any, x: Any) -> Any:
    half, one = np.float32(0.5), np.float32(1)
    if node.options["approximate"]:
        cubic = x + np.float32(0.044715) * (x * x * x)
        return x * (half * (one + arrays.tanh(np.float32(math.sqrt(2 / math.pi)) * cubic)))
    return half * x * (one - _erf(arrays, -x * np.float32(math.sqrt(0.5))))


def _softmax(arrays: Arrays, node: Any, x: Any) -> Any:
    powers = arrays.exp(x - arrays.max(x, axis=-1, keepdims=True))
    return powers / arrays.sum(powers, axis=-1, keepdims=True)


def _layer_norm(arrays: Arrays, node: Any, x: Any) -> Any:
    mean = arrays.mean(x, axis=-1, keepdims=True)
    variance = arrays.mean(x * x, axis=-1, keepdims=True) - mean * mean
    variance = arrays.maximum(variance, np.float32(0))
    scale = node.arrays["scale"] / arrays.sqrt(variance + np.float32(node.options["epsilon"]))
    return (x - mean) * scale + node.arrays["offset"]


def _normed(node: Any, shapes: Sequence[Shape]) -> Shape:
    require(node.arrays.keys() == {"scale", "offset"} and node.options["epsilon"] >= 0)
    require(all(array.shape == shapes[0][-1:] for array in node.arrays.values()))
    return shapes[0]


def _reduction(function: str) -> Operation:
    def run(arrays: Arrays, node: Any, x: Any) -> Any:
        return getattr(arrays, function)(x, axis=tuple(axis + 1 for axis in node.options["axes"]))

    def shape(node: Any, shapes: Sequence[Shape]) -> Shape:
        axes = node.options["axes"]
        require(all(0 <= axis < len(shapes[0]) for axis in axes))
        return tuple(side for axis, side in enumerate(shapes[0]) if axis not in axes)

    return Operation(run, shape)


def _reshaped(node: Any, shapes: Sequence[Shape]) -> Shape:
    require(math.prod(shapes[0]) == math.prod(node.options["shape"]))
    return tuple(node.options["shape"])


def _expanded(node: Any, shapes: Sequence[Shape]) -> Shape:
    require(len(shapes[0]) == len(node.options["shape"]))
    require(np.broadcast_shapes(shapes[0], node.options["shape"]) == node.options["shape"])
    return tuple(node.options["shape"])


def _transposed(node: Any, shapes: Sequence[Shape]) -> Shape:
    require(sorted(node.options["order"]) == list(range(1, len(shapes[0]) + 1)))
    return tuple(shapes[0][axis - 1] for axis in node.options["order"])


def _slices(node: Any) -> tuple[slice, ...]:
    return tuple(slice(*bounds) for bounds in node.options["bounds"])


def _sliced(node: Any, shapes: Sequence[Shape]) -> Shape:
    require(len(node.options["bounds"]) == len(shapes[0]))
    for (start, stop, step), side in zip(node.options["bounds"], shapes[0], strict=True):
        require(0 <= start < stop <= side and step >= 1)
    return tuple(len(range(*bounds)) for bounds in node.options["bounds"])


def _joined(node: Any, shapes: Sequence[Shape]) -> Shape:
    axis = node.options["axis"]
    rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
    require(len(rest) == 1 and 0 <= axis < len(shapes[0]))
    first = shapes[0]
    return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])


def _padded(node: Any, shapes: Sequence[Shape]) -> Shape:
    margins = node.options["margins"]
    require(len(margins) == len(shapes[0]) and np.min(margins) >= 0)
    return tuple(side + sum(pair) for side, pair in zip(shapes[0], margins, strict=True))


def _join(arrays: Arrays, node: Any, *values: Any) -> Any:
    images = max(len(value) for value in values)  # constants have one
    values = [arrays.broadcast_to(value, (images, *value.shape[1:])) for value in values]
    return arrays.concatenate(values, axis=node.options["axis"] + 1)


def _pad(arrays: Arrays, node: Any, x: Any) -> Any:
    value = np.float32(node.options["value"])
    return arrays.pad(x, ((0, 0), *node.options["margins"]), constant_values=value)


def _windows(node: Any, shapes: Sequence[Shape]) -> Shape:
    size, strides, padding = (node.options[key] for key in ("size", "strides", "padding"))
    require(len(shapes[0]) == 3 and min(strides) >= 1)
    sides = []
    for side, window, stride, pair in zip(shapes[0][:2], size, strides, padding, strict=True):
        require(min(pair) >= 0 and max(pair) < window <= side + sum(pair))
        sides.append((side + sum(pair) - window) // stride + 1)
    return (*sides, shapes[0][2])


def _over_windows(function: str, empty: float) -> Operation:
    def run(arrays: Arrays, node: Any, x: Any) -> Any:
        size, strides, padding = (node.options[key] for key in ("size", "strides", "padding"))
        height, width, _ = _windows(node, [x.shape[1:]])
        x = arrays.pad(x, ((0, 0), *padding, (0, 0)), constant_values=np.float32(empty))
        parts = []
        for i, j in np.ndindex(*size):
            rows = slice(i, i + (height - 1) * strides[0] + 1, strides[0])
            columns = slice(j, j + (width - 1) * strides[1] + 1, strides[1])
            parts.append(x[:, rows, columns])
        return functools.reduce(getattr(arrays, function), parts)

    return Operation(run, _windows)


def _constant_shape(node: Any, shapes: Sequence[Shape]) -> Shape:
    require(node.arrays["value"].size == math.prod(node.options["shape"]))
    return tuple(node.options["shape"])


OPERATIONS = {
    "abs": _elementwise("abs", 1),
    "erf": _elementwise(_erf, 1),
    "exp": _elementwise("exp", 1),
    "floor": _elementwise("floor", 1),
    "log": _elementwise("log", 1),
    "negate": _elementwise("negative", 1),
    "rsqrt": _elementwise(lambda arrays, x: np.float32(1) / arrays.sqrt(x), 1),
    "sigmoid": _elementwise(_sigmoid, 1),
    "sign": _elementwise("sign", 1),
    "sqrt": _elementwise("sqrt", 1),
    "tanh": _elementwise("tanh", 1),
    "add": _elementwise("add", 2),
    "subtract": _elementwise("subtract", 2),
    "multiply": _elementwise("multiply", 2),
    "divide": _elementwise("divide", 2),
    "maximum": _elementwise("maximum", 2),
    "minimum": _elementwise("minimum", 2),
    "greater": _elementwise("greater", 2),  # 1 or 0
    "greater_equal": _elementwise("greater_equal", 2),
    "less": _elementwise("less", 2),
    "less_equal": _elementwise("less_equal", 2),
    "where": _elementwise(lambda arrays, condition, *both: arrays.where(condition > 0, *both), 3),
    # Over the last axis; scale and offset have its size.
    "layer_norm": Operation(_layer_norm, _normed),
    "softmax": Operation(_softmax, lambda node, shapes: shapes[0]),
    "gelu": Operation(_gelu, lambda node, shapes: shapes[0]),
    "sum": _reduction("sum"),
    "greatest": _reduction("max"),
    "least": _reduction("min"),
    "max_window": _over_windows("maximum", -np.inf),
    "sum_window": _over_windows("add", 0.0),
    "reshape": Operation(
        lambda arrays, node, x: x.reshape(len(x), *node.options["shape"]), _reshaped
    ),
    "expand": Operation(
        lambda arrays, node, x: arrays.broadcast_to(x, (len(x), *node.options["shape"])), _expanded
    ),
    "transpose": Operation(
        lambda arrays, node, x: x.transpose(0, *node.options["order"]), _transposed
    ),
    "slice": Operation(lambda arrays, node, x: x[(slice(None), *_slices(node))], _sliced),
    "concatenate": Operation(_join, _joined, None),
    "pad": Operation(_pad, _padded),
    "constant": Operation(
        lambda arrays, node: arrays.asarray(
            node.arrays["value"].reshape(1, *node.options["shape"])
        ),
        _constant_shape,
        0,
    ),
}
