"""Writers for the two ONNX quantization formats, QCDQ and QONNX (onnx_files.py)."""

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from metamix_jax.errors import UserError
from metamix_jax.exporters.executor import ones_product
from metamix_jax.exporters.graph import Graph, Node

QONNX_DOMAIN = "qonnx.custom_op.general"


def require_onnx() -> Any:
    """Returns the module `onnx`; raises UserError if it is not installed."""
    try:
        import onnx
    except ImportError as error:
        raise UserError(
            "ONNX export needs the package onnx: pip install 'onnx>=1.18,<2', or skip the ONNX "
            "files with --config.export.onnx=False"
        ) from error
    return onnx


def kernel_levels(node: Node) -> np.ndarray:
    """Returns a kernel's levels in ONNX layout; conv: [features, channels / groups, k, k]."""
    levels = node.kernel.levels
    return levels.transpose(3, 2, 0, 1) if node.op == "conv" else levels


def layer_constant(node: Node, graph: Graph) -> np.ndarray:
    """Returns a layer's bias minus the contribution of its input's shift.

    [1, features]; [1, height, width, features] where padding makes it differ between places.
    """
    constant = np.zeros((1,) * (1 + len(node.shape)), np.float32)
    if "bias" in node.arrays:
        constant = constant + node.arrays["bias"]
    if node.quantizer is not None and node.quantizer.shift:
        share = ones_product(node, graph.shape_of(node.inputs[0])) * node.kernel.step
        constant = constant - np.float32(node.quantizer.shift) * share
    places = constant.reshape(-1, constant.shape[-1])
    return places[:1] if (places == places[0]).all() else constant


class Writer:
    """Collects ONNX nodes and constants."""

    domain = ""
    opset = 17

    def __init__(self) -> None:
        self.nodes, self.constants = [], []
        self._known: set[str] = set()
        self._kernels: dict[tuple, str] = {}  # shape, type and content -> name
        self.onnx = require_onnx()

    def add(self, op: str, inputs: str | Sequence[str], output: str, **attributes: Any) -> str:
        """Adds an ONNX node with one output and returns the output's name."""
        inputs = [inputs] if isinstance(inputs, str) else list(inputs)
        name = f"{output}/{op}"
        node = self.onnx.helper.make_node(op, inputs, [output], name=name, **attributes)
        self.nodes.append(node)
        return output

    def constant(self, name: str, value: Any, dtype: type = np.float32) -> str:
        """Adds a constant, unless already present, and returns its name."""
        if name not in self._known:
            self._known.add(name)
            self.constants.append(self.onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def kernel_constant(self, name: str, value: np.ndarray) -> str:
        """Adds a kernel, unless it is there already by the name of a layer's first run."""
        content = value.shape, value.dtype.name, value.tobytes()
        if content not in self._kernels:
            self._kernels[content] = self.constant(name, value, value.dtype)
        return self._kernels[content]


class ExactWriter(Writer, abc.ABC):
    """Also writes how a layer's input and kernel are quantized, exactly as in JAX."""

    def layer_input(self, node: Node, x: str) -> str:
        """Returns the quantized input of a layer, level * step."""
        quantizer = node.quantizer
        if quantizer is None:
            return x
        if quantizer.shift:
            shift = self.constant(f"{node.name}/shift", quantizer.shift)
            x = self.add("Add", [x, shift], f"{node.name}/shifted")
        return self.quantized(node, x)

    @abc.abstractmethod
    def quantized(self, node: Node, x: str) -> str:
        """Returns level * step of a layer's input `x`, which is already shifted."""

    @abc.abstractmethod
    def kernel(self, node: Node, axis: int) -> str:
        """Returns level * step of a layer's kernel, with features along `axis`."""


class QcdqWriter(ExactWriter):
    """Writes QuantizeLinear, Clip and DequantizeLinear nodes."""

    def quantized(self, node: Node, x: str) -> str:
        """See `ExactWriter`."""
        quantizer, name = node.quantizer, f"{node.name}/input"
        container = np.int8 if quantizer.signed else np.uint8
        scale = [
            self.constant(f"{name}/step", quantizer.step),
            self.constant(f"{name}/zero", 0, container),
        ]
        levels = self.add("QuantizeLinear", [x, *scale], f"{name}/levels")
        low, high = quantizer.bounds
        if (low, high) != (0, 255):  # the container's own range
            bounds = [
                self.constant(f"{name}/low", low, container),
                self.constant(f"{name}/high", high, container),
            ]
            levels = self.add("Clip", [levels, *bounds], f"{name}/clipped")
        return self.add("DequantizeLinear", [levels, *scale], name)

    def kernel(self, node: Node, axis: int) -> str:
        """See `ExactWriter`."""
        name = f"{node.name}/kernel"
        inputs = [
            self.kernel_constant(f"{name}/levels", kernel_levels(node)),
            self.constant(f"{name}/step", node.kernel.step),
            self.constant(f"{name}/zeros", np.zeros(node.kernel.step.shape), np.int8),
        ]
        return self.add("DequantizeLinear", inputs, name, axis=axis)


class QonnxWriter(ExactWriter):
    """Writes QONNX `Quant` nodes."""

    domain = QONNX_DOMAIN

    def quantized(self, node: Node, x: str) -> str:
        """See `ExactWriter`."""
        quantizer = node.quantizer
        step, bits = np.float32(quantizer.step), quantizer.bits
        return self._quant(x, f"{node.name}/input", step, bits, quantizer.signed)

    def kernel(self, node: Node, axis: int) -> str:
        """See `ExactWriter`."""
        name, levels = f"{node.name}/kernel", kernel_levels(node)
        step = np.moveaxis(node.kernel.step.reshape(-1, *[1] * (levels.ndim - 1)), 0, axis)
        real = self.kernel_constant(f"{name}/real", levels * step)
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


class FloatWriter(QonnxWriter):
    """Writes kernels in real units, without quantization."""

    domain = ""

    def _quant(self, x: str, name: str, step: np.ndarray, bits: int, signed: bool) -> str:
        return x
