"""The network as ONNX, in two formats with the same skeleton.

QCDQ, for onnxruntime and other ONNX runtimes: QuantizeLinear, Clip to the layer's bits, then
DequantizeLinear, in 8-bit containers; kernels are int8 with a DequantizeLinear. onnxruntime 1.31
rejects chains of 4- and 2-bit types at its default optimisation level, so these are not used.

QONNX, for qonnx, FINN and hls4ml: `Quant` nodes (domain qonnx.custom_op.general) with the true bits
at each layer's input and kernel. The batch is 1, as qonnx's cost analysis needs static shapes.

With a shifted input, level q represents q * step - shift. Both formats multiply q * step, so that a
layer's input stays recognizable as integers, and subtract the shift's contribution, a constant map
(zero padding represents 0, not level 0), from the product.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metamix_jax.exporters import onnx_channels_last
from metamix_jax.exporters.executor import ones_product
from metamix_jax.exporters.graph import IMAGE, Graph, Node
from metamix_jax.exporters.onnx_writers import (
    QONNX_DOMAIN,
    ExactWriter,
    FloatWriter,
    QcdqWriter,
    QonnxWriter,
    Writer,
    kernel_levels,
    require_onnx,
)

OPSET = 17
IR_VERSION = 8  # onnx's default is newer than onnxruntime and qonnx accept
INT4_OPSET, INT4_IR_VERSION = 21, 10
SCORES = "scores"
DIGEST = "sha256"  # in the metadata


def qcdq_model(graph: Graph) -> bytes:
    """Returns the QCDQ model: float32 `image` [batch, c, h, w] -> `scores` [batch, num_classes]."""
    return encode(graph, QcdqWriter(), batch="batch")


def qonnx_model(graph: Graph) -> bytes:
    """Returns the QONNX model: float32 `image` [1, c, h, w] -> `scores` [1, num_classes]."""
    return encode(graph, QonnxWriter(), batch=1)


def float_model(graph: Graph) -> bytes:
    """Returns the network as ordinary float32 ONNX, without quantizers, to compare with."""
    nodes = tuple(dataclasses.replace(each, quantizer=None, other=None) for each in graph.nodes)
    return encode(dataclasses.replace(graph, nodes=nodes), FloatWriter(), batch="batch")


def encode(graph: Graph, writer: ExactWriter, batch: int | str) -> bytes:
    """Returns the serialized ONNX model of `writer`'s nodes; batch: a size or a symbol."""
    if graph.general:
        onnx_channels_last.add_image(writer)
        for node in graph.nodes:
            lowering = onnx_channels_last.LOWERINGS[node.op]
            lowering(writer, onnx_channels_last.with_image(node), graph)
    else:
        for node in graph.nodes:
            LOWERINGS[node.op](writer, node, graph)
    writer.add("Identity", graph.nodes[-1].name, SCORES)
    return finish(graph, writer, batch, _known_shapes(graph, batch))


def finish(
    graph: Graph,
    writer: Writer,
    batch: int | str,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    *,
    packed: bool = False,
) -> bytes:
    """Returns the serialized ONNX model of what a writer holds.

    Args:
      graph: its input and output.
      writer: its nodes and constants.
      batch: a size or a symbol.
      shapes: of tensors whose shapes onnx cannot infer.
      packed: whether there are INT4 constants, which need a newer opset.
    """
    onnx = require_onnx()
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    body = helper.make_graph(
        writer.nodes,
        graph.model,
        [helper.make_tensor_value_info(IMAGE, float32, _channels_first(batch, graph.image_shape))],
        [helper.make_tensor_value_info(SCORES, float32, [batch, graph.num_classes])],
        writer.constants,
        value_info=[
            helper.make_tensor_value_info(name, float32, shape)
            for name, shape in (shapes or {}).items()
        ],
    )
    opset, ir_version = (INT4_OPSET, INT4_IR_VERSION) if packed else (OPSET, IR_VERSION)
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(QONNX_DOMAIN, 1)] if writer.domain else []
    model = helper.make_model(body, opset_imports=opsets, producer_name="metamix_jax")
    model.ir_version = ir_version
    facts = {"mean": str(list(graph.mean)), "std": str(list(graph.std)), "layout": "NCHW"}
    helper.set_model_props(model, facts)
    if not writer.domain:
        onnx.checker.check_model(model, full_check=True)
    model = onnx.shape_inference.infer_shapes(model)
    model.metadata_props.add(key=DIGEST, value=digest(model))
    return model.SerializeToString()


def digest(model: Any) -> str:
    """Returns the SHA-256 digest of a model, apart from the digest in its metadata."""
    rest = type(model)()
    rest.CopyFrom(model)
    del rest.metadata_props[:]
    rest.metadata_props.extend(entry for entry in model.metadata_props if entry.key != DIGEST)
    return hashlib.sha256(rest.SerializeToString(deterministic=True)).hexdigest()


def _known_shapes(graph: Graph, batch: int | str) -> dict[str, Sequence[int | str]]:
    """Returns the shapes of tensors; onnx cannot infer them through Quant nodes."""

    def shape(found: Sequence[int]) -> list[int | str]:
        return [batch, *found] if graph.general else _channels_first(batch, found)

    shapes = {node.name: shape(node.shape) for node in graph.nodes if node.op != "constant"}
    for node in graph.layers:
        shapes[f"{node.name}/kernel"] = kernel_levels(node).shape
    for node in graph.nodes:
        ends = {"input": node.quantizer, "second/input": node.other}
        for (end, quantizer), name in zip(ends.items(), node.inputs, strict=False):
            if quantizer is not None:
                shapes[f"{node.name}/{end}"] = shape(graph.shape_of(name))
    return shapes


def _channels_first(batch: int | str, shape: Sequence[int]) -> list[int | str]:
    return [batch, *shape] if len(shape) == 1 else [batch, shape[2], shape[0], shape[1]]


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
    constant = np.zeros((1,) * (1 + len(node.shape)), np.float32)
    if "bias" in node.arrays:
        constant = constant + node.arrays["bias"]
    if node.quantizer is not None and node.quantizer.shift:
        share = ones_product(node, graph.shape_of(node.inputs[0])) * node.kernel.step
        constant = constant - np.float32(node.quantizer.shift) * share
        places = constant.reshape(-1, constant.shape[-1])
        if (places == places[0]).all():  # no padding
            constant = places[0].reshape((1,) * len(node.shape) + (-1,))
    if constant.ndim == 4:
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


def _clip_to_6(writer: ExactWriter, x: str, output: str) -> str:
    return writer.add("Clip", [x, writer.constant("0", 0), writer.constant("6", 6)], output)


def _hard_sigmoid(writer: ExactWriter, node: Node, output: str) -> str:
    # Not ONNX's HardSigmoid, which multiplies by 1/6 and so rounds differently.
    moved = writer.add("Add", [node.inputs[0], writer.constant("3", 3)], f"{node.name}/plus_3")
    clipped = _clip_to_6(writer, moved, f"{node.name}/clipped")
    return writer.add("Div", [clipped, writer.constant("6", 6)], output)


def _hswish(writer: ExactWriter, node: Node, graph: Graph) -> None:
    gate = _hard_sigmoid(writer, node, f"{node.name}/gate")
    writer.add("Mul", [node.inputs[0], gate], node.name)


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


def _plain(op: str):
    def lower(writer: ExactWriter, node: Node, graph: Graph) -> None:
        writer.add(op, node.inputs, node.name)

    return lower


LOWERINGS = {
    "conv": _conv,
    "dense": _dense,
    "affine": _affine,
    "relu": _plain("Relu"),
    "relu6": lambda writer, node, graph: _clip_to_6(writer, node.inputs[0], node.name),
    "hswish": _hswish,
    "hsigmoid": lambda writer, node, graph: _hard_sigmoid(writer, node, node.name),
    "sigmoid": _plain("Sigmoid"),
    "add": _plain("Add"),
    "multiply": _plain("Mul"),
    "mean": _plain("GlobalAveragePool"),
    "flatten": _plain("Flatten"),  # only after `mean`, so the axis order does not matter
    "max_pool": _max_pool,
    "subsample": _subsample,
}
