"""ONNX nodes for convolutional networks, whose channels come first in ONNX."""

import numpy as np

from metamix_jax.exporters.graph import Graph, Node
from metamix_jax.exporters.onnx_elementwise import ELEMENTWISE, Lowering, named
from metamix_jax.exporters.onnx_writers import ExactWriter, layer_constant


def _conv(writer: ExactWriter, node: Node, graph: Graph) -> None:
    options = node.options
    (top, bottom), (left, right) = options["padding"]
    product = writer.add(
        "Conv",
        [writer.layer_input(node, node.inputs[0]), writer.kernel(node, axis=0)],
        f"{node.name}/product",
        kernel_shape=node.kernel.levels.shape[:2],
        strides=[options["stride"]] * 2,
        pads=[top, left, bottom, right],
        dilations=[1, 1],
        group=options["groups"],
    )
    _add_constant(writer, node, graph, product)


def _dense(writer: ExactWriter, node: Node, graph: Graph) -> None:
    kernel = writer.kernel(node, axis=1)
    inputs = [writer.layer_input(node, node.inputs[0]), kernel]
    _add_constant(writer, node, graph, writer.add("MatMul", inputs, f"{node.name}/product"))


def _add_constant(writer: ExactWriter, node: Node, graph: Graph, product: str) -> None:
    """Adds a layer's bias minus the contribution of its input's shift."""
    constant = layer_constant(node, graph)
    if len(node.shape) == 3:
        constant = constant.reshape(1, *constant.shape[1:-1] or (1, 1), constant.shape[-1])
        constant = constant.transpose(0, 3, 1, 2)
    writer.add("Add", [product, writer.constant(f"{node.name}/constant", constant)], node.name)


def _affine(writer: ExactWriter, node: Node, graph: Graph) -> None:
    shape = (1, -1, *(1 for _ in node.shape[1:]))
    scale, offset = (
        writer.constant(f"{node.name}/{name}", node.arrays[name].reshape(shape))
        for name in ("scale", "offset")
    )
    scaled = writer.add("Mul", [node.inputs[0], scale], f"{node.name}/scaled")
    writer.add("Add", [scaled, offset], node.name)


def _max_pool(writer: ExactWriter, node: Node, graph: Graph) -> None:
    (top, bottom), (left, right) = node.options["padding"]
    writer.add(
        "MaxPool",
        node.inputs,
        node.name,
        kernel_shape=[node.options["size"]] * 2,
        strides=[node.options["stride"]] * 2,
        pads=[top, left, bottom, right],
    )


def _subsample(writer: ExactWriter, node: Node, graph: Graph) -> None:
    stride, (before, after) = node.options["stride"], node.options["channels"]
    numbers = {"starts": [0, 0], "ends": [2**31 - 1] * 2, "axes": [2, 3], "steps": [stride] * 2}
    inputs = [
        writer.constant(f"{node.name}/{name}", value, np.int64) for name, value in numbers.items()
    ]
    taken = writer.add("Slice", [*node.inputs, *inputs], f"{node.name}/taken")
    margins = writer.constant(f"{node.name}/margins", [0, before, 0, 0, 0, after, 0, 0], np.int64)
    writer.add("Pad", [taken, margins], node.name)


LOWERINGS: dict[str, Lowering] = ELEMENTWISE | {
    "conv": _conv,
    "dense": _dense,
    "affine": _affine,
    "mean": named("GlobalAveragePool"),
    "flatten": named("Flatten"),  # only after `mean`, so the axis order does not matter
    "max_pool": _max_pool,
    "subsample": _subsample,
}
