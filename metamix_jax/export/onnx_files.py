"""The network as ONNX, in two forms with the same skeleton.

QCDQ, for onnxruntime and what else runs ONNX: QuantizeLinear, Clip to the level's bits, then
DequantizeLinear, in 8-bit containers; kernels are int8 behind a DequantizeLinear. onnxruntime 1.31
refuses chains of 4- and 2-bit types at its default optimisation level, so these are not used.

QONNX, for qonnx, FINN, hls4ml: a `Quant` node (domain qonnx.custom_op.general) with the true bits
at each layer's input and kernel. Its batch is 1, as qonnx's cost analysis wants static shapes.

Where an input is shifted, level q stands for q * step - shift. Both forms multiply q * step, which
is what keeps a layer's input recognizable as integers, and take the shift's share, a constant map
(zero padding stands for 0, not for level 0), from the product.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from metamix_jax.errors import UserError
from metamix_jax.export.executor import ones_product
from metamix_jax.export.graph import IMAGE, Graph, Node

OPSET = 17
IR_VERSION = 8  # onnx writes newer ones by default than onnxruntime and qonnx take
QONNX_DOMAIN = "qonnx.custom_op.general"
SCORES = "scores"


def require_onnx() -> Any:
    """Returns the module `onnx`; raises UserError where it is not installed."""
    try:
        import onnx
    except ImportError as error:
        raise UserError(
            "ONNX files need the package onnx, which is not installed: pip install 'onnx>=1.18,<2',"
            " or leave them out with --config.export.onnx=False"
        ) from error
    return onnx


def qcdq_model(graph: Graph) -> bytes:
    """Returns the QCDQ form: float32 `image` [batch, c, h, w] -> `scores` [batch, num_classes]."""
    return _encode(graph, _QcdqWriter(), batch="batch")


def qonnx_model(graph: Graph) -> bytes:
    """Returns the QONNX form: float32 `image` [1, c, h, w] -> `scores` [1, num_classes]."""
    return _encode(graph, _QonnxWriter(), batch=1)


def _encode(graph: Graph, writer: "_Writer", batch: int | str) -> bytes:
    onnx = require_onnx()
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    for node in graph.nodes:
        LOWERINGS[node.op](writer, node, graph)
    last = graph.nodes[-1].name
    writer.add("Identity", last, SCORES)
    shapes = {node.name: _channels_first(batch, node.shape) for node in graph.nodes}
    for node in graph.layers:  # onnx infers no shapes beyond Quant
        shapes[f"{node.name}/kernel"] = _kernel_levels(node).shape
        if node.quantizer is not None:
            shapes[f"{node.name}/input"] = _channels_first(batch, graph.shape_of(node.inputs[0]))
    body = helper.make_graph(
        writer.nodes,
        graph.model,
        [helper.make_tensor_value_info(IMAGE, float32, _channels_first(batch, graph.image_shape))],
        [helper.make_tensor_value_info(SCORES, float32, [batch, graph.num_classes])],
        writer.constants,
        value_info=[
            helper.make_tensor_value_info(name, float32, shape) for name, shape in shapes.items()
        ],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    opsets += [helper.make_opsetid(QONNX_DOMAIN, 1)] if writer.domain else []
    model = helper.make_model(body, opset_imports=opsets, producer_name="metamix_jax")
    model.ir_version = IR_VERSION
    helper.set_model_props(
        model, {"mean": str(list(graph.mean)), "std": str(list(graph.std)), "layout": "NCHW, RGB"}
    )
    if not writer.domain:
        onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model).SerializeToString()


def _kernel_levels(node: Node) -> np.ndarray:
    """Returns a kernel in ONNX's layout, [features, channels / groups, k, k] of a convolution."""
    levels = node.kernel.levels
    return levels.transpose(3, 2, 0, 1) if node.op == "conv" else levels


def _channels_first(batch: int | str, shape: Sequence[int]) -> list[int | str]:
    return [batch, *shape] if len(shape) == 1 else [batch, shape[2], shape[0], shape[1]]


class _Writer:
    """The nodes and constants so far."""

    domain = ""

    def __init__(self) -> None:
        self.nodes, self.constants = [], []
        self._known: set[str] = set()
        self._onnx = require_onnx()

    def add(self, op: str, inputs: str | Sequence[str], output: str, **attributes: Any) -> str:
        """Adds an ONNX node with one output, whose name it returns."""
        inputs = [inputs] if isinstance(inputs, str) else list(inputs)
        name = f"{output}/{op}"
        node = self._onnx.helper.make_node(op, inputs, [output], name=name, **attributes)
        self.nodes.append(node)
        return output

    def constant(self, name: str, value: Any, dtype: type = np.float32) -> str:
        """Adds a constant, whose name it returns."""
        if name not in self._known:
            self._known.add(name)
            self.constants.append(
                self._onnx.numpy_helper.from_array(np.asarray(value, dtype), name)
            )
        return name

    def layer_input(self, node: Node, x: str) -> str:
        """Returns the quantized input of a layer, level * step."""
        quantizer = node.quantizer
        if quantizer is None:
            return x
        if quantizer.shift:
            shift = self.constant(f"{node.name}/shift", quantizer.shift)
            x = self.add("Add", [x, shift], f"{node.name}/shifted")
        return self.quantized(node, x)

    def quantized(self, node: Node, x: str) -> str:
        """Returns level * step of the layer's input, already shifted."""
        raise NotImplementedError

    def kernel(self, node: Node, axis: int) -> str:
        """Returns level * step of a layer's kernel, its features along `axis`."""
        raise NotImplementedError


class _QcdqWriter(_Writer):
    def quantized(self, node: Node, x: str) -> str:
        quantizer, name = node.quantizer, f"{node.name}/input"
        container = np.int8 if quantizer.signed else np.uint8
        scale = [
            self.constant(f"{name}/step", quantizer.step),
            self.constant(f"{name}/zero", 0, container),
        ]
        levels = self.add("QuantizeLinear", [x, *scale], f"{name}/levels")
        low, high = quantizer.bounds
        if (low, high) != (0, 255):  # what the container holds by itself
            bounds = [
                self.constant(f"{name}/low", low, container),
                self.constant(f"{name}/high", high, container),
            ]
            levels = self.add("Clip", [levels, *bounds], f"{name}/clipped")
        return self.add("DequantizeLinear", [levels, *scale], name)

    def kernel(self, node: Node, axis: int) -> str:
        name = f"{node.name}/kernel"
        inputs = [
            self.constant(f"{name}/levels", _kernel_levels(node), np.int8),
            self.constant(f"{name}/step", node.kernel.step),
            self.constant(f"{name}/zeros", np.zeros(node.kernel.step.shape), np.int8),
        ]
        return self.add("DequantizeLinear", inputs, name, axis=axis)


class _QonnxWriter(_Writer):
    domain = QONNX_DOMAIN

    def quantized(self, node: Node, x: str) -> str:
        quantizer = node.quantizer
        step, bits = np.float32(quantizer.step), quantizer.bits
        return self._quant(x, f"{node.name}/input", step, bits, quantizer.signed)

    def kernel(self, node: Node, axis: int) -> str:
        name, levels = f"{node.name}/kernel", _kernel_levels(node)
        step = np.moveaxis(node.kernel.step.reshape(-1, *[1] * (levels.ndim - 1)), 0, axis)
        real = self.constant(f"{name}/real", levels * step)
        return self._quant(real, name, step, node.kernel.bits, signed=True)

    def _quant(self, x: str, name: str, step: np.ndarray, bits: int, signed: bool) -> str:
        inputs = [
            x,
            self.constant(f"{name}/step", step),
            self.constant(f"{name}/zero", 0),
            self.constant(f"{name}/bits", bits),
        ]
        attributes = {"signed": int(signed), "narrow": int(signed), "rounding_mode": "ROUND"}
        return self.add("Quant", inputs, name, domain=QONNX_DOMAIN, **attributes)


def _conv(writer: _Writer, node: Node, graph: Graph) -> None:
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


def _dense(writer: _Writer, node: Node, graph: Graph) -> None:
    kernel = writer.kernel(node, axis=1)
    inputs = [writer.layer_input(node, node.inputs[0]), kernel]
    _add_constant(writer, node, graph, writer.add("MatMul", inputs, f"{node.name}/product"))


def _add_constant(writer: _Writer, node: Node, graph: Graph, product: str) -> None:
    """Adds a layer's bias, less the share of its input's shift."""
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


def _affine(writer: _Writer, node: Node, graph: Graph) -> None:
    scale, offset = (
        writer.constant(f"{node.name}/{name}", node.arrays[name].reshape(1, -1, 1, 1))
        for name in ("scale", "offset")
    )
    scaled = writer.add("Mul", [node.inputs[0], scale], f"{node.name}/scaled")
    writer.add("Add", [scaled, offset], node.name)


def _clip_to_6(writer: _Writer, x: str, output: str) -> str:
    return writer.add("Clip", [x, writer.constant("0", 0), writer.constant("6", 6)], output)


def _hard_sigmoid(writer: _Writer, node: Node, output: str) -> str:
    # Not ONNX's HardSigmoid, which multiplies by 1/6 and rounds differently.
    moved = writer.add("Add", [node.inputs[0], writer.constant("3", 3)], f"{node.name}/plus_3")
    clipped = _clip_to_6(writer, moved, f"{node.name}/clipped")
    return writer.add("Div", [clipped, writer.constant("6", 6)], output)


def _hswish(writer: _Writer, node: Node, graph: Graph) -> None:
    gate = _hard_sigmoid(writer, node, f"{node.name}/gate")
    writer.add("Mul", [node.inputs[0], gate], node.name)


def _max_pool(writer: _Writer, node: Node, graph: Graph) -> None:
    (top, bottom), (left, right) = node.options["padding"]
    writer.add(
        "MaxPool",
        node.inputs,
        node.name,
        kernel_shape=[node.options["size"]] * 2,
        strides=[node.options["stride"]] * 2,
        pads=[top, left, bottom, right],
    )


def _subsample(writer: _Writer, node: Node, graph: Graph) -> None:
    stride, (before, after) = node.options["stride"], node.options["channels"]
    numbers = {"starts": [0, 0], "ends": [2**31 - 1] * 2, "axes": [2, 3], "steps": [stride] * 2}
    inputs = [
        writer.constant(f"{node.name}/{name}", value, np.int64) for name, value in numbers.items()
    ]
    taken = writer.add("Slice", [*node.inputs, *inputs], f"{node.name}/taken")
    margins = writer.constant(f"{node.name}/margins", [0, before, 0, 0, 0, after, 0, 0], np.int64)
    writer.add("Pad", [taken, margins], node.name)


def _plain(op: str):
    def lower(writer: _Writer, node: Node, graph: Graph) -> None:
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
    "add": _plain("Add"),
    "multiply": _plain("Mul"),
    "mean": _plain("GlobalAveragePool"),
    "flatten": _plain("Flatten"),  # only after `mean`, so that the order of axes does not matter
    "max_pool": _max_pool,
    "subsample": _subsample,
}
