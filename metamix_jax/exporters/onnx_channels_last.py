"""ONNX nodes for general networks, whose channels come last.

The image is transposed once. Convolutions and windows, which ONNX defines for channels that come
first, are transposed there and back; runtimes move these transpositions and cancel most.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from metamix_jax.exporters.executor import ones_product
from metamix_jax.exporters.graph import IMAGE, Graph, Node
from metamix_jax.exporters.onnx_writers import ExactWriter

Lowering = Callable[[ExactWriter, Node, Graph], None]
CHANNELS_LAST_IMAGE = f"{IMAGE}/channels_last"
_TO_FIRST, _TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


def add_image(writer: ExactWriter) -> None:
    """Adds the transposed image."""
    writer.add("Transpose", IMAGE, CHANNELS_LAST_IMAGE, perm=_TO_LAST)


def with_image(node: Node) -> Node:
    """Returns a node that takes the transposed image where it took the image."""
    inputs = tuple(CHANNELS_LAST_IMAGE if name == IMAGE else name for name in node.inputs)
    return dataclasses.replace(node, inputs=inputs)


def _conv(writer: ExactWriter, node: Node, graph: Graph) -> None:
    options, name = node.options, node.name
    (top, bottom), (left, right) = options["padding"]
    x = writer.layer_input(node, node.inputs[0])
    first = writer.add("Transpose", x, f"{name}/channels_first", perm=_TO_FIRST)
    product = writer.add(
        "Conv", [first, writer.kernel(node, axis=0)], f"{name}/product",
        kernel_shape=node.kernel.levels.shape[:2], strides=[options["stride"]] * 2,
        pads=[top, left, bottom, right], dilations=[1, 1], group=options["groups"],
    )  # fmt: skip
    _minus_shift(writer, node, graph, writer.add("Transpose", product, f"{name}/last",
                                                 perm=_TO_LAST))  # fmt: skip


def _dense(writer: ExactWriter, node: Node, graph: Graph) -> None:
    inputs = [writer.layer_input(node, node.inputs[0]), writer.kernel(node, axis=1)]
    _minus_shift(writer, node, graph, writer.add("MatMul", inputs, f"{node.name}/product"))


def _minus_shift(writer: ExactWriter, node: Node, graph: Graph, product: str) -> None:
    """Subtracts the contribution of the input's shift, as in `onnx_files`."""
    if node.quantizer is None or not node.quantizer.shift:
        writer.add("Identity", product, node.name)
        return
    name = IMAGE if node.inputs[0] == CHANNELS_LAST_IMAGE else node.inputs[0]
    share = ones_product(node, graph.shape_of(name)) * node.kernel.step
    constant = np.float32(node.quantizer.shift) * share
    writer.add("Sub", [product, writer.constant(f"{node.name}/constant", constant)], node.name)


def _product(writer: ExactWriter, node: Node, graph: Graph) -> None:
    second = dataclasses.replace(node, name=f"{node.name}/second", quantizer=node.other)
    operands = []
    for each, x in zip((node, second), node.inputs, strict=True):
        x = writer.layer_input(each, x)
        if each.quantizer is not None and each.quantizer.shift:
            amount = writer.constant(f"{each.name}/amount", each.quantizer.shift)
            x = writer.add("Sub", [x, amount], f"{each.name}/real")
        operands.append(x)
    writer.add("MatMul", operands, node.name)


def _named(op: str, **attributes: int) -> Lowering:
    def lower(writer: ExactWriter, node: Node, graph: Graph) -> None:
        writer.add(op, node.inputs, node.name, **attributes)

    return lower


def _rsqrt(writer: ExactWriter, node: Node, graph: Graph) -> None:
    root = writer.add("Sqrt", node.inputs, f"{node.name}/root")
    writer.add("Reciprocal", root, node.name)


def _comparison(op: str) -> Lowering:
    def lower(writer: ExactWriter, node: Node, graph: Graph) -> None:
        found = writer.add(op, node.inputs, f"{node.name}/bool")
        writer.add("Cast", found, node.name, to=1)  # float32

    return lower


def _where(writer: ExactWriter, node: Node, graph: Graph) -> None:
    condition, *values = node.inputs
    true = writer.add("Greater", [condition, writer.constant("0", 0)], f"{node.name}/condition")
    writer.add("Where", [true, *values], node.name)


def _sum(writer: ExactWriter, node: Node, graph: Graph) -> None:
    axes = [axis + 1 for axis in node.options["axes"]]
    inputs = [*node.inputs, writer.constant(f"{node.name}/axes", axes, np.int64)]
    writer.add("ReduceSum", inputs, node.name, keepdims=0)


def _extreme(op: str) -> Lowering:
    def lower(writer: ExactWriter, node: Node, graph: Graph) -> None:
        axes = [axis + 1 for axis in node.options["axes"]]
        writer.add(op, node.inputs, node.name, axes=axes, keepdims=0)

    return lower


def _reshape(writer: ExactWriter, node: Node, graph: Graph) -> None:
    shape = writer.constant(f"{node.name}/shape", [-1, *node.options["shape"]], np.int64)
    writer.add("Reshape", [*node.inputs, shape], node.name)


def _expand(writer: ExactWriter, node: Node, graph: Graph) -> None:
    shape = writer.constant(f"{node.name}/shape", [1, *node.options["shape"]], np.int64)
    writer.add("Expand", [*node.inputs, shape], node.name)


def _transpose(writer: ExactWriter, node: Node, graph: Graph) -> None:
    writer.add("Transpose", node.inputs, node.name, perm=[0, *node.options["order"]])


def _slice(writer: ExactWriter, node: Node, graph: Graph) -> None:
    starts, ends, steps = zip(*node.options["bounds"], strict=True)
    axes = range(1, len(starts) + 1)
    numbers = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    inputs = [
        writer.constant(f"{node.name}/{name}", list(value), np.int64)
        for name, value in numbers.items()
    ]
    writer.add("Slice", [*node.inputs, *inputs], node.name)


def _concatenate(writer: ExactWriter, node: Node, graph: Graph) -> None:
    constants = {each.name for each in graph.nodes if each.op == "constant"}
    inputs = []
    for number, x in enumerate(node.inputs):
        if x in constants:  # the same for all images, of which ONNX wants one each
            whole = writer.add("Shape", IMAGE, f"{node.name}/shape{number}", start=0, end=1)
            sides = writer.constant(f"{node.name}/sides{number}", graph.shape_of(x), np.int64)
            shape = writer.add("Concat", [whole, sides], f"{node.name}/target{number}", axis=0)
            x = writer.add("Expand", [x, shape], f"{node.name}/expanded{number}")
        inputs.append(x)
    writer.add("Concat", inputs, node.name, axis=node.options["axis"] + 1)


def _pad(writer: ExactWriter, node: Node, graph: Graph) -> None:
    before, after = zip(*node.options["margins"], strict=True)
    margins = writer.constant(f"{node.name}/margins", [0, *before, 0, *after], np.int64)
    value = writer.constant(f"{node.name}/value", node.options["value"])
    writer.add("Pad", [*node.inputs, margins, value], node.name)


def _window(op: str, **attributes: int) -> Lowering:
    def lower(writer: ExactWriter, node: Node, graph: Graph) -> None:
        options, name = node.options, node.name
        (top, bottom), (left, right) = options["padding"]
        first = writer.add("Transpose", node.inputs, f"{name}/channels_first", perm=_TO_FIRST)
        found = writer.add(
            op, first, f"{name}/windows", kernel_shape=options["size"], strides=options["strides"],
            pads=[top, left, bottom, right], **attributes,
        )  # fmt: skip
        if op == "AveragePool":
            count = writer.constant(f"{name}/count", math.prod(options["size"]))
            found = writer.add("Mul", [found, count], f"{name}/sums")
        writer.add("Transpose", found, name, perm=_TO_LAST)

    return lower


def _constant(writer: ExactWriter, node: Node, graph: Graph) -> None:
    writer.constant(node.name, node.arrays["value"].reshape(1, *node.options["shape"]))


LOWERINGS: dict[str, Lowering] = {
    "conv": _conv,
    "dense": _dense,
    "product": _product,
    "abs": _named("Abs"),
    "erf": _named("Erf"),
    "exp": _named("Exp"),
    "floor": _named("Floor"),
    "log": _named("Log"),
    "negate": _named("Neg"),
    "rsqrt": _rsqrt,
    "sigmoid": _named("Sigmoid"),
    "sign": _named("Sign"),
    "sqrt": _named("Sqrt"),
    "tanh": _named("Tanh"),
    "add": _named("Add"),
    "subtract": _named("Sub"),
    "multiply": _named("Mul"),
    "divide": _named("Div"),
    "maximum": _named("Max"),
    "minimum": _named("Min"),
    "greater": _comparison("Greater"),
    "greater_equal": _comparison("GreaterOrEqual"),
    "less": _comparison("Less"),
    "less_equal": _comparison("LessOrEqual"),
    "where": _where,
    "sum": _sum,
    "greatest": _extreme("ReduceMax"),
    "least": _extreme("ReduceMin"),
    "max_window": _window("MaxPool"),
    "sum_window": _window("AveragePool", count_include_pad=1),
    "reshape": _reshape,
    "expand": _expand,
    "transpose": _transpose,
    "slice": _slice,
    "concatenate": _concatenate,
    "pad": _pad,
    "constant": _constant,
}
