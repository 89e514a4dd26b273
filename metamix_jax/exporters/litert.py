"""The network for LiteRT (TensorFlow Lite), in int8, from the same plan as network.int8.onnx.

Written with the schema that comes with the runtime; TensorFlow is not needed. Levels are those of
the plan less 128, as LiteRT has int8 without uint8. Channels come last.
"""

from collections.abc import Callable

import numpy as np

from metamix_jax.exporters.graph import IMAGE, Graph, Node
from metamix_jax.exporters.integer_layers import Integers, gate_read, integers, reading
from metamix_jax.exporters.integer_plan import GATE, HIGHEST, Plan, Step, Storage
from metamix_jax.exporters.litert_writer import LitertWriter

SIGMOID = Storage(1 / 256, 0)  # what LiteRT's kernel writes
SCORES_MARGIN = 1.25  # of the range of scores on calibration images


def litert_model(graph: Graph, plan: Plan, scores: tuple[float, float]) -> bytes:
    """Returns the model: float32 `image` [n, h, w, c] -> `scores` [n, num_classes].

    Args:
      graph: its input and output.
      plan: for integer kernels.
      scores: least and greatest on training images.
    """
    writer = LitertWriter(plan, graph)
    low, high = (SCORES_MARGIN * bound for bound in (min(scores[0], 0.0), max(scores[1], 0.0)))
    step = (high - low) / HIGHEST or 1.0
    last = plan.steps[-1].output
    writer.storage[last] = Storage(step, round(-low / step))
    image = writer.tensor(IMAGE, graph.image_shape)
    writer.clipped(IMAGE, graph.image_shape, lambda out: writer.add("QUANTIZE", [image], out))
    for each in plan.steps:
        _EMIT[each.node.op](writer, each)
    scores_tensor = writer.tensor("scores", (graph.num_classes,))
    flat = writer.reshaped(writer.levels[last], "scores/levels", (graph.num_classes,))
    writer.add("DEQUANTIZE", [flat], scores_tensor)
    return writer.finish(image, scores_tensor)


def _layer(writer: LitertWriter, step: Step) -> None:
    node, name, found = step.node, step.output, reading(step.node, writer.plan)
    (taken,) = node.inputs
    x, shape = writer.levels[taken], writer.shapes[taken]
    if found.read is not None:
        x = writer.mapped(x, f"{node.name}/input", shape, found.read, found.storage)
    whole, storage = integers(step, found)
    if storage != found.storage:
        x = writer.reshaped(x, f"{node.name}/x", shape, storage)
    padding = node.options["padding"] if node.op == "conv" else ((0, 0), (0, 0))
    if node.op == "dense":  # as a convolution, whose kernels may have a step per feature
        x, shape = writer.reshaped(x, f"{node.name}/features", (1, 1, *shape)), (1, 1, *shape)
    if np.any(padding):
        margins = (*padding, (0, 0))
        x, shape = writer.padded(x, f"{node.name}/pad", shape, margins, storage, storage.zero)
    kernel, bias, depthwise = _constants(writer, node, whole)
    stride = node.options.get("stride", 1)
    fields = {"strideH": stride, "strideW": stride, "padding": writer.schema.Padding.VALID,
              "dilationHFactor": 1, "dilationWFactor": 1}  # fmt: skip
    if depthwise:
        op, options = "DEPTHWISE_CONV_2D", writer.options("DepthwiseConv2D", **fields)
        options.depthMultiplier = 1
    else:
        op, options = "CONV_2D", writer.options("Conv2D", **fields)
    wanted = node.shape if len(node.shape) == 3 else (1, 1, *node.shape)
    found = writer.clipped(
        name, wanted, lambda out: writer.add(op, [x, kernel, bias], out, options)
    )
    if len(node.shape) == 1:
        writer.levels[name] = writer.reshaped(found, f"{name}/flat", node.shape)
        writer.shapes[name] = node.shape


def _constants(writer: LitertWriter, node: Node, whole: Integers) -> tuple[int, int, bool]:
    """Adds a kernel and a bias; also returns whether the layer is depthwise."""
    levels = whole.levels * np.int8(whole.factor)
    if node.op == "dense":
        levels = levels[None, None]
    depthwise = levels.shape[2] == 1 and node.options.get("groups", 1) == levels.shape[3] > 1
    levels = levels.transpose(2, 0, 1, 3) if depthwise else levels.transpose(3, 0, 1, 2)
    zeros, axis = np.zeros(whole.step.size, int), 3 if depthwise else 0
    kernel = writer.constant(f"{node.name}/kernel", levels, whole.step, zeros, axis)
    bias = writer.constant(f"{node.name}/bias", whole.bias, whole.product, zeros)
    return kernel, bias, depthwise


def _between(op: str, options: str) -> Callable[[LitertWriter, Step], None]:
    """Returns how to emit an operation on stored tensors."""

    def emit(writer: LitertWriter, step: Step) -> None:
        inputs = [writer.levels[name] for name in step.node.inputs]
        kind = writer.options(options)
        writer.clipped(step.output, step.node.shape, lambda out: writer.add(op, inputs, out, kind))

    return emit


def _mean(writer: LitertWriter, step: Step) -> None:
    axes = writer.constant(f"{step.output}/axes", np.int32([1, 2]))
    inputs, options = [writer.levels[step.node.inputs[0]], axes], writer.options("Reducer")
    options.keepDims = True
    writer.clipped(
        step.output, step.node.shape, lambda out: writer.add("MEAN", inputs, out, options)
    )


def _rectifier(writer: LitertWriter, step: Step) -> None:
    (x,), storage = step.node.inputs, writer.storage
    read, write = storage[x], storage[step.output]
    writer.mapped(writer.levels[x], step.output, writer.shapes[x], read, write)


def _sigmoid(writer: LitertWriter, step: Step) -> None:
    (x,), shape = step.node.inputs, step.node.shape
    wide = writer.tensor(f"{step.output}/256", shape, SIGMOID)
    writer.add("LOGISTIC", [writer.levels[x]], wide)
    writer.clipped(step.output, shape, lambda out: writer.add("QUANTIZE", [wide], out))


def _gate(writer: LitertWriter, step: Step, name: str, write: Storage) -> int:
    """Adds clip(x / 6 + 1 / 2, 0, 1): reading levels in another way, and the ends of the levels."""
    (x,) = step.node.inputs
    read = gate_read(writer.storage[x])
    return writer.mapped(writer.levels[x], name, writer.shapes[x], read, write)


def _hard_sigmoid(writer: LitertWriter, step: Step) -> None:
    _gate(writer, step, step.output, writer.storage[step.output])


def _hswish(writer: LitertWriter, step: Step) -> None:
    gate = _gate(writer, step, f"{step.output}/gate", GATE)
    inputs, options = [writer.levels[step.node.inputs[0]], gate], writer.options("Mul")
    writer.clipped(
        step.output, step.node.shape, lambda out: writer.add("MUL", inputs, out, options)
    )


def _max_pool(writer: LitertWriter, step: Step) -> None:
    (name,), options = step.node.inputs, step.node.options
    x, shape, storage = writer.levels[name], writer.shapes[name], writer.storage[name]
    if np.any(options["padding"]):
        margins = (*options["padding"], (0, 0))
        x, _ = writer.padded(x, f"{step.output}/pad", shape, margins, storage, 0)
    kind = writer.options(
        "Pool2D", strideH=options["stride"], strideW=options["stride"],
        filterHeight=options["size"], filterWidth=options["size"],
        padding=writer.schema.Padding.VALID,
    )  # fmt: skip
    output = writer.tensor(f"{step.output}/levels", step.node.shape, storage)
    writer.levels[step.output] = writer.add("MAX_POOL_2D", [x], output, kind)
    writer.shapes[step.output] = step.node.shape


def _subsample(writer: LitertWriter, step: Step) -> None:
    (name,), output, options = step.node.inputs, step.output, step.node.options
    x, shape, storage = writer.levels[name], writer.shapes[name], writer.storage[name]
    stride, channels = options["stride"], options["channels"]
    if stride > 1:
        height, width = (-(-side // stride) for side in shape[:2])
        sides = shape
        shape = (height, width, shape[2])
        numbers = [(0, 0, 0, 0), (0, *sides), (1, stride, stride, 1)]
        inputs = [
            x,
            *(
                writer.constant(f"{output}/{end}", np.int32(row))
                for end, row in zip(("begin", "end", "strides"), numbers, strict=True)
            ),
        ]
        kind = writer.options("StridedSlice", beginMask=1, endMask=1)
        taken = writer.tensor(f"{output}/taken", shape, storage)
        x = writer.add("STRIDED_SLICE", inputs, taken, kind)
    if any(channels):
        margins = ((0, 0), (0, 0), channels)
        x, shape = writer.padded(x, f"{output}/padded", shape, margins, storage, storage.zero)
    writer.levels[output], writer.shapes[output] = x, shape


def _flatten(writer: LitertWriter, step: Step) -> None:
    (name,), shape = step.node.inputs, step.node.shape
    writer.levels[step.output] = writer.reshaped(writer.levels[name], f"{step.output}/flat", shape)
    writer.shapes[step.output] = shape


_EMIT = {
    "conv": _layer,
    "dense": _layer,
    "add": _between("ADD", "Add"),
    "multiply": _between("MUL", "Mul"),
    "mean": _mean,
    "relu": _rectifier,
    "relu6": _rectifier,
    "sigmoid": _sigmoid,
    "hsigmoid": _hard_sigmoid,
    "hswish": _hswish,
    "max_pool": _max_pool,
    "flatten": _flatten,
    "subsample": _subsample,
}
