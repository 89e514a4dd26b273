"""ONNX nodes for general networks, whose channels come last.

The image is transposed once. Convolutions and windows, which ONNX defines for channels that come
first, are transposed there and back; runtimes move these transpositions and cancel most.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from metamix_jax.exporters.graph import IMAGE, Graph, Node
from metamix_jax.exporters.onnx_elementwise import ELEMENTWISE, Lowering, named
from metamix_jax.exporters.onnx_writers import ExactWriter, Writer, layer_constant

CHANNELS_LAST_IMAGE = f"{IMAGE}/channels_last"
_TO_FIRST, _TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


def add_image(writer: Writer) -> None:
    """Adds the transposed image."""
    writer.add("Transpose", IMAGE, CHANNELS_LAST_IMAGE, perm=_TO_LAST)


def with_image(node: Node) -> Node:
    """Returns a node that takes the transposed image where it took the image."""
    inputs = tuple(CHANNELS_LAST_IMAGE if name == IMAGE else name for name in node.inputs)
    return dataclasses.replace(node, inputs=inputs)


def _to_first(writer: Writer, x: str, node: Node) -> str:
    return writer.add("Transpose", x, f"{node.name}/channels_first", perm=_TO_FIRST)


def _conv(writer: ExactWriter, node: Node, graph: Graph) -> None:
    options, name = node.options, node.name
    (top, bottom), (left, right) = options["padding"]
    x = writer.layer_input(node, node.inputs[0])
    product = writer.add(
        "Conv", [_to_first(writer, x, node), writer.kernel(node, axis=0)], f"{name}/product",
        kernel_shape=node.kernel.levels.shape[:2], strides=[options["stride"]] * 2,
        pads=[top, left, bottom, right], dilations=[1, 1], group=options["groups"],
    )  # fmt: skip
    last = writer.add("Transpose", product, f"{name}/last", perm=_TO_LAST)
    _add_constant(writer, node, graph, last)


def _dense(writer: ExactWriter, node: Node, graph: Graph) -> None:
    inputs = [writer.layer_input(node, node.inputs[0]), writer.kernel(node, axis=1)]
    _add_constant(writer, node, graph, writer.add("MatMul", inputs, f"{node.name}/product"))


def _add_constant(writer: ExactWriter, node: Node, graph: Graph, product: str) -> None:
    """Adds a layer's bias minus the contribution of its input's shift."""
    name = IMAGE if node.inputs[0] == CHANNELS_LAST_IMAGE else node.inputs[0]
    constant = layer_constant(dataclasses.replace(node, inputs=(name,)), graph)
    if constant.any():
        writer.add("Add", [product, writer.constant(f"{node.name}/constant", constant)], node.name)
    else:
        writer.add("Identity", product, node.name)


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


def _layer_norm(writer: Writer, node: Node, graph: Graph) -> None:
    arrays = [writer.constant(f"{node.name}/{name}", node.arrays[name])
              for name in ("scale", "offset")]  # fmt: skip
    epsilon = node.options["epsilon"]
    writer.add("LayerNormalization", [*node.inputs, *arrays], node.name, axis=-1, epsilon=epsilon)


def _affine(writer: Writer, node: Node, graph: Graph) -> None:
    scale, offset = (
        writer.constant(f"{node.name}/{name}", node.arrays[name]) for name in ("scale", "offset")
    )
    scaled = writer.add("Mul", [*node.inputs, scale], f"{node.name}/scaled")
    writer.add("Add", [scaled, offset], node.name)


def _sum(writer: Writer, node: Node, graph: Graph) -> None:
    axes = [axis + 1 for axis in node.options["axes"]]
    inputs = [*node.inputs, writer.constant(f"{node.name}/axes", axes, np.int64)]
    writer.add("ReduceSum", inputs, node.name, keepdims=0)


def _reduced(writer: Writer, op: str, node: Node, axes: Sequence[int], keepdims: int) -> None:
    if writer.opset < 18:
        writer.add(op, node.inputs, node.name, axes=axes, keepdims=keepdims)
        return
    inputs = [*node.inputs, writer.constant(f"{node.name}/axes", axes, np.int64)]
    writer.add(op, inputs, node.name, keepdims=keepdims)


def _extreme(op: str) -> Lowering:
    def lower(writer: Writer, node: Node, graph: Graph) -> None:
        _reduced(writer, op, node, [axis + 1 for axis in node.options["axes"]], keepdims=0)

    return lower


def _reshape(writer: Writer, node: Node, graph: Graph) -> None:
    shape = writer.constant(f"{node.name}/shape", [-1, *node.options["shape"]], np.int64)
    writer.add("Reshape", [*node.inputs, shape], node.name)


def _expand(writer: Writer, node: Node, graph: Graph) -> None:
    shape = writer.constant(f"{node.name}/shape", [1, *node.options["shape"]], np.int64)
    writer.add("Expand", [*node.inputs, shape], node.name)


def _transpose(writer: Writer, node: Node, graph: Graph) -> None:
    writer.add("Transpose", node.inputs, node.name, perm=[0, *node.options["order"]])


def _slice(writer: Writer, node: Node, graph: Graph) -> None:
    starts, ends, steps = zip(*node.options["bounds"], strict=True)
    axes = range(1, len(starts) + 1)
    numbers = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    inputs = [
        writer.constant(f"{node.name}/{name}", list(value), np.int64)
        for name, value in numbers.items()
    ]
    writer.add("Slice", [*node.inputs, *inputs], node.name)


def _concatenate(writer: Writer, node: Node, graph: Graph) -> None:
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


def _pad(writer: Writer, node: Node, graph: Graph) -> None:
    before, after = zip(*node.options["margins"], strict=True)
    margins = writer.constant(f"{node.name}/margins", [0, *before, 0, *after], np.int64)
    value = writer.constant(f"{node.name}/value", node.options["value"])
    writer.add("Pad", [*node.inputs, margins, value], node.name)


def _window(op: str, **attributes: int) -> Lowering:
    def lower(writer: Writer, node: Node, graph: Graph) -> None:
        options, name = node.options, node.name
        (top, bottom), (left, right) = options["padding"]
        first = _to_first(writer, node.inputs[0], node)
        found = writer.add(
            op, first, f"{name}/windows", kernel_shape=options["size"], strides=options["strides"],
            pads=[top, left, bottom, right], **attributes,
        )  # fmt: skip
        if op == "AveragePool":
            count = writer.constant(f"{name}/count", math.prod(options["size"]))
            found = writer.add("Mul", [found, count], f"{name}/sums")
        writer.add("Transpose", found, name, perm=_TO_LAST)

    return lower


def _constant(writer: Writer, node: Node, graph: Graph) -> None:
    writer.constant(node.name, node.arrays["value"].reshape(1, *node.options["shape"]))


def _mean(writer: Writer, node: Node, graph: Graph) -> None:
    _reduced(writer, "ReduceMean", node, [1, 2], keepdims=1)


def _max_pool(writer: Writer, node: Node, graph: Graph) -> None:
    size, stride, padding = (node.options[key] for key in ("size", "stride", "padding"))
    options = {"size": (size, size), "strides": (stride, stride), "padding": padding}
    _window("MaxPool")(writer, dataclasses.replace(node, options=options), graph)


def _subsample(writer: Writer, node: Node, graph: Graph) -> None:
    stride, margins = node.options["stride"], ((0, 0), (0, 0), node.options["channels"])
    bounds = [(0, side, stride) for side in graph.shape_of(node.inputs[0])[:2]]
    taken = f"{node.name}/taken"
    bounds.append((0, graph.shape_of(node.inputs[0])[2], 1))
    _slice(writer, dataclasses.replace(node, name=taken, options={"bounds": bounds}), graph)
    options = {"margins": margins, "value": 0.0}
    _pad(writer, dataclasses.replace(node, inputs=(taken,), options=options), graph)


LOWERINGS: dict[str, Lowering] = ELEMENTWISE | {
    "conv": _conv,
    "dense": _dense,
    "product": _product,
    "affine": _affine,
    "softmax": named("Softmax", axis=-1),
    "layer_norm": _layer_norm,
    "sum": _sum,
    "mean": _mean,
    "greatest": _extreme("ReduceMax"),
    "least": _extreme("ReduceMin"),
    "max_window": _window("MaxPool"),
    "sum_window": _window("AveragePool", count_include_pad=1),
    "max_pool": _max_pool,
    "subsample": _subsample,
    "reshape": _reshape,
    "flatten": named("Flatten"),
    "expand": _expand,
    "transpose": _transpose,
    "slice": _slice,
    "concatenate": _concatenate,
    "pad": _pad,
    "constant": _constant,
}
