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

from metamix_jax.exporters import onnx_channels_first, onnx_channels_last
from metamix_jax.exporters.graph import IMAGE, Graph
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

IR_VERSIONS = {17: 8, 21: 10}  # opset -> oldest; onnx's default is newer than runtimes accept
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
            onnx_channels_first.LOWERINGS[node.op](writer, node, graph)
    writer.add("Identity", graph.nodes[-1].name, SCORES)
    return finish(graph, writer, batch, _known_shapes(graph, batch))


def finish(
    graph: Graph,
    writer: Writer,
    batch: int | str,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
) -> bytes:
    """Returns the serialized ONNX model of what a writer holds.

    Args:
      graph: its input and output.
      writer: its nodes and constants.
      batch: a size or a symbol.
      shapes: of tensors whose shapes onnx cannot infer.
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
    opsets = [helper.make_opsetid("", writer.opset)]
    opsets += [helper.make_opsetid(QONNX_DOMAIN, 1)] if writer.domain else []
    model = helper.make_model(body, opset_imports=opsets, producer_name="metamix_jax")
    model.ir_version = IR_VERSIONS[writer.opset]
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
