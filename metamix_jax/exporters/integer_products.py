"""ONNX for integer kernels, of general networks such as transformers.

Layers and products multiply integers. What lies between them (norms, softmax, GELU, additions)
stays in float, for which onnxruntime has fast kernels and mostly no others; sums leave a dense
layer as real values. A convolution's leave in 8 bits, over the range seen on training images,
because its integer kernel returns nothing else.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from metamix_jax.exporters import onnx_channels_last
from metamix_jax.exporters.graph import IMAGE, Graph, Node, Quantizer
from metamix_jax.exporters.integer_layers import Integers, Reading, integers
from metamix_jax.exporters.integer_plan import HIGHEST, Step, Storage, fold, levels_of
from metamix_jax.exporters.onnx_files import SCORES, finish
from metamix_jax.exporters.onnx_levels import MOST_INT16, LevelsWriter


def convolutions(graph: Graph) -> tuple[str, ...]:
    """Returns the tensors whose ranges `products_model` needs."""
    steps = fold(graph.nodes)
    return tuple(
        step.output for step in steps if step.node.op == "conv" and not _patch(step, graph)
    )


def products_model(
    graph: Graph, ranges: Mapping[str, tuple[float, float]], packed: bool = False
) -> bytes:
    """Returns the model: float32 `image` [batch, c, h, w] -> `scores` [batch, num_classes].

    Args:
      graph: the network.
      ranges: tensor -> least and greatest value on training images, for `convolutions`.
      packed: whether kernels of at most 4 bits are stored as INT4 (opset 21).
    """
    writer = LevelsWriter(packed)
    onnx_channels_last.add_image(writer)
    for step in fold(graph.nodes):
        patch, shape = _patch(step, graph), graph.shape_of((*step.node.inputs, IMAGE)[0])
        step = dataclasses.replace(step, node=onnx_channels_last.with_image(step.node))
        if step.node.op == "product":
            _product(writer, step)
        elif step.node.kernel is None:
            name = _unbounded(step)
            node = dataclasses.replace(step.node, name=name)
            onnx_channels_last.LOWERINGS[node.op](writer, node, graph)
            _bounds(writer, step, name)
        elif patch:
            _dense(writer, step, patch, shape)
        else:
            _conv(writer, step, ranges[step.output])
    writer.add("Identity", graph.nodes[-1].name, SCORES)
    return finish(graph, writer, batch="batch")


def _patch(step: Step, graph: Graph) -> int:
    """Returns the side of the patches that a layer multiplies by one matrix; 0: it does not."""
    if step.node.op != "conv":
        return int(step.node.op == "dense")
    options, size = step.node.options, step.levels.shape[0]
    height, width, _ = graph.shape_of(step.node.inputs[0])
    apart = options["stride"] == size and not (height % size or width % size)
    return size if apart and options["groups"] == 1 and not np.any(options["padding"]) else 0


def _levels(writer: LevelsWriter, x: str, name: str, quantizer: Quantizer) -> str:
    """Adds the levels of a layer's input, from 0."""
    if quantizer.shift:
        shift = writer.constant(f"{name}/shift", quantizer.shift)
        x = writer.add("Add", [x, shift], f"{name}/shifted")
    return writer.quantize(x, f"{name}/levels", levels_of(quantizer))


def _dense(writer: LevelsWriter, step: Step, patch: int, shape: tuple[int, ...]) -> None:
    """Adds a product with a matrix; its sums and its bias are real values."""
    node, quantizer = step.node, step.node.quantizer
    matrix, bias = step.levels.reshape(-1, step.levels.shape[-1]), step.bias
    name, x = _unbounded(step), node.inputs[0]
    if quantizer is None:  # an image at full precision
        x = _patches(writer, node, x, patch, shape)
    else:
        levels = _levels(writer, x, f"{node.name}/input", quantizer)
        levels = _patches(writer, node, levels, patch, shape)
        x = writer.real(levels, f"{node.name}/x", levels_of(quantizer))
        bias = bias - quantizer.shift * matrix.sum(axis=0, dtype=np.int64) * step.step
    if quantizer is not None and len(node.shape) == 1:  # runtimes take two axes as Gemm
        whole, _ = integers(step, _reading(quantizer), MOST_INT16)
        writer.add("Gemm", [x, writer.kernel(node, whole), writer.bias(node, whole)], name)
    else:
        whole = Integers(matrix, 1, np.float32(step.step), np.zeros(0, np.int32), np.zeros(0))
        product = writer.add("MatMul", [x, writer.kernel(node, whole)], f"{node.name}/product")
        # Even if it is zero: a product that a quantizer and something else take is not fused.
        writer.add("Add", [product, writer.constant(f"{node.name}/bias", bias)], name)
    _bounds(writer, step, name)


def _reading(quantizer: Quantizer) -> Reading:
    return Reading(None, levels_of(quantizer), quantizer.shift)


def _patches(writer: LevelsWriter, node: Node, x: str, patch: int, shape: tuple[int, ...]) -> str:
    """Adds [n, h, w, c] -> [n, h / patch, w / patch, patch * patch * c]."""
    if patch == 1:
        return x
    height, width, channels = shape
    sides, name = [height // patch, width // patch], f"{node.name}/patches"
    split = writer.constant(
        f"{name}/split", [-1, sides[0], patch, sides[1], patch, channels], np.int64
    )
    joined = writer.constant(f"{name}/joined", [-1, *sides, patch * patch * channels], np.int64)
    x = writer.add("Reshape", [x, split], f"{name}/in_rows")
    x = writer.add("Transpose", x, f"{name}/in_order", perm=(0, 1, 3, 2, 4, 5))
    return writer.add("Reshape", [x, joined], name)


def _conv(writer: LevelsWriter, step: Step, bounds: tuple[float, float]) -> None:
    node, quantizer = step.node, step.node.quantizer
    first, last = (0, 3, 1, 2), (0, 2, 3, 1)
    if quantizer is None:  # an image at full precision
        x = writer.add("Transpose", node.inputs, f"{node.name}/channels_first", perm=first)
        whole, _ = integers(step, Reading(None, Storage(1.0, 0), 0.0))
    else:
        levels = _levels(writer, node.inputs[0], f"{node.name}/input", quantizer)
        levels = writer.add("Transpose", levels, f"{node.name}/channels_first", perm=first)
        whole, storage = integers(step, _reading(quantizer), MOST_INT16)
        x = writer.real(levels, f"{node.name}/x", storage)
    product = writer.conv(node, x, whole, f"{node.name}/product")
    stored = _stored(bounds)
    levels = writer.quantize(product, f"{node.name}/output", stored)
    levels = writer.add("Transpose", levels, f"{node.name}/channels_last", perm=last)
    writer.real(levels, step.output, stored)


def _stored(bounds: tuple[float, float]) -> Storage:
    """Returns 256 levels over a range and 0; a ReLU's range starts there, which makes it one."""
    least, most = min(bounds[0], 0.0), max(bounds[1], 0.0)
    size = (most - least) / HIGHEST or 1.0
    return Storage(size, round(-least / size))


def _product(writer: LevelsWriter, step: Step) -> None:
    node, operands = step.node, []
    for end, quantizer, x in zip(
        ("first", "second"), (node.quantizer, node.other), node.inputs, strict=True
    ):
        name = f"{node.name}/{end}"
        real = writer.real(_levels(writer, x, name, quantizer), f"{name}/x", levels_of(quantizer))
        if quantizer.shift:
            amount = writer.constant(f"{name}/amount", quantizer.shift)
            real = writer.add("Sub", [real, amount], f"{name}/unshifted")
        operands.append(real)
    writer.add("MatMul", operands, step.output)


def _unbounded(step: Step) -> str:
    """Returns the name of a result before the ReLU that the step absorbed, if it did."""
    return step.output if np.isinf(step.least) else f"{step.output}/unbounded"


def _bounds(writer: LevelsWriter, step: Step, name: str) -> None:
    """Adds that ReLU."""
    if name == step.output:
        return
    if np.isinf(step.most):
        writer.add("Relu", name, step.output)
    else:
        ends = [writer.constant(str(end), end) for end in (step.least, step.most)]
        writer.add("Clip", [name, *ends], step.output)
