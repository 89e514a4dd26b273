"""ONNX for integer kernels: what onnxruntime runs fastest, judged by its accuracy.

Convolutions, dense layers, additions, multiplications and means stand between DequantizeLinear and
QuantizeLinear, so that runtimes replace each group by one integer kernel. The levels of a layer are
those of its bits, in 8-bit containers; batch norm is folded into kernels and biases, which moves
single levels, and tensors that are taken twice are stored at 8 bits (integer_plan.py).
"""

from typing import Any

import numpy as np

from metamix_jax.exporters.graph import IMAGE, Graph, Node
from metamix_jax.exporters.integer_layers import Reading, gate_read, integers, reading
from metamix_jax.exporters.integer_plan import GATE, Plan, Step, Storage
from metamix_jax.exporters.onnx_files import SCORES, finish
from metamix_jax.exporters.onnx_levels import MOST_INT16, LevelsWriter


def integer_model(graph: Graph, plan: Plan, packed: bool = False) -> bytes:
    """Returns the model: float32 `image` [batch, c, h, w] -> `scores` [batch, num_classes].

    packed: kernels of at most 4 bits are stored as INT4 (opset 21) and turned into int8 when the
      file is loaded.
    """
    writer = _IntegerWriter(plan, packed)
    writer.store(IMAGE, IMAGE)
    for step in plan.steps:
        _EMIT[step.node.op](writer, step)
    writer.add("Identity", f"{plan.steps[-1].output}/real", SCORES)
    return finish(graph, writer, batch="batch")


class _IntegerWriter(LevelsWriter):
    """Tensor NAME is NAME/real while it is computed and NAME/levels as it is stored."""

    def __init__(self, plan: Plan, packed: bool):
        super().__init__(packed)
        self.plan, self.storage = plan, plan.storage

    def store(self, name: str, real: str) -> None:
        """Adds the levels of a tensor, if anything takes it."""
        if name in self.storage:
            self.quantize(real, f"{name}/levels", self.storage[name])

    def taken(self, name: str, taker: str) -> str:
        """Adds the real values of a stored tensor, for one taker."""
        return self.real(f"{name}/levels", f"{taker}/of/{name}", self.storage[name])

    def mapped(self, levels: str, name: str, read: Storage, write: Storage) -> str:
        """Adds levels read in one way and written in another; runtimes look them up in a table."""
        real = self.real(levels, f"{name}/read", read)
        same = self.add("LeakyRelu", real, f"{name}/same", alpha=1.0)  # has an integer kernel
        return self.quantize(same, name, write)

    def layer_levels(self, node: Node, found: Reading) -> str:
        """Returns the levels that a layer multiplies."""
        (name,) = node.inputs
        if found.read is None:
            return f"{name}/levels"
        return self.mapped(f"{name}/levels", f"{node.name}/input", found.read, found.storage)


def _layer(writer: _IntegerWriter, step: Step) -> None:
    node, found = step.node, reading(step.node, writer.plan)
    levels = writer.layer_levels(node, found)
    whole, storage = integers(step, found, MOST_INT16)  # AVX2 adds two products in 16 bits
    x = writer.real(levels, f"{node.name}/x", storage)
    real = f"{step.output}/real"
    if node.op == "dense":
        inputs = [x, writer.kernel(node, whole), writer.bias(node, whole)]
        writer.add("Gemm", inputs, real)
    else:
        writer.conv(node, x, whole, real)
    writer.store(step.output, real)


def _between(op: str):
    """Returns how to emit an operation with an integer kernel of its own."""

    def emit(writer: _IntegerWriter, step: Step) -> None:
        inputs = [
            writer.taken(name, f"{step.output}/{i}") for i, name in enumerate(step.node.inputs)
        ]
        writer.store(step.output, writer.add(op, inputs, f"{step.output}/real"))

    return emit


def _mean(writer: _IntegerWriter, step: Step) -> None:
    flat, output = len(step.node.shape) == 1, step.output
    x = writer.taken(step.node.inputs[0], output)
    real = writer.add("GlobalAveragePool", x, f"{output}/real")
    if not flat:
        writer.store(output, real)
        return
    levels = writer.quantize(real, f"{output}/pooled", writer.storage[output])
    writer.add("Flatten", levels, f"{output}/levels")


def _rectifier(writer: _IntegerWriter, step: Step) -> None:
    """Adds a ReLU that no layer absorbs: its bounds are those of the levels it is stored at."""
    (x,), storage = step.node.inputs, writer.storage
    writer.mapped(f"{x}/levels", f"{step.output}/levels", storage[x], storage[step.output])


def _gate(writer: _IntegerWriter, step: Step, name: str, write: Storage) -> str:
    """Adds clip(x / 6 + 1 / 2, 0, 1): reading levels in another way, and the ends of uint8."""
    (x,) = step.node.inputs
    return writer.mapped(f"{x}/levels", name, gate_read(writer.storage[x]), write)


def _hard_sigmoid(writer: _IntegerWriter, step: Step) -> None:
    _gate(writer, step, f"{step.output}/levels", writer.storage[step.output])


def _hswish(writer: _IntegerWriter, step: Step) -> None:
    gate = _gate(writer, step, f"{step.output}/gate", GATE)
    inputs = [
        writer.taken(step.node.inputs[0], step.output),
        writer.real(gate, f"{step.output}/gate/real", GATE),
    ]
    writer.store(step.output, writer.add("Mul", inputs, f"{step.output}/real"))


def _on_levels(op: str, **attributes: Any):
    def emit(writer: _IntegerWriter, step: Step) -> None:
        writer.add(op, f"{step.node.inputs[0]}/levels", f"{step.output}/levels", **attributes)

    return emit


def _max_pool(writer: _IntegerWriter, step: Step) -> None:
    options, ((top, bottom), (left, right)) = step.node.options, step.node.options["padding"]
    _on_levels(
        "MaxPool", kernel_shape=[options["size"]] * 2, strides=[options["stride"]] * 2,
        pads=[top, left, bottom, right],
    )(writer, step)  # fmt: skip


def _subsample(writer: _IntegerWriter, step: Step) -> None:
    name, options = step.output, step.node.options
    stride, (before, after) = options["stride"], options["channels"]
    levels, padded = f"{step.node.inputs[0]}/levels", before or after
    if stride > 1 or not padded:
        numbers = {
            "starts": [0] * 2,
            "ends": [2**31 - 1] * 2,
            "axes": [2, 3],
            "steps": [stride] * 2,
        }
        inputs = [
            writer.constant(f"{name}/{key}", value, np.int64) for key, value in numbers.items()
        ]
        taken = f"{name}/taken" if padded else f"{name}/levels"
        levels = writer.add("Slice", [levels, *inputs], taken)
    if padded:
        margins = writer.constant(f"{name}/margins", [0, before, 0, 0, 0, after, 0, 0], np.int64)
        zero = writer.constant(f"{name}/padding", writer.storage[name].zero, np.uint8)
        writer.add("Pad", [levels, margins, zero], f"{name}/levels")


_EMIT = {
    "conv": _layer,
    "dense": _layer,
    "add": _between("Add"),
    "multiply": _between("Mul"),
    "mean": _mean,
    "relu": _rectifier,
    "relu6": _rectifier,
    "sigmoid": _between("Sigmoid"),
    "hsigmoid": _hard_sigmoid,
    "hswish": _hswish,
    "max_pool": _max_pool,
    "flatten": _on_levels("Flatten"),
    "subsample": _subsample,
}
