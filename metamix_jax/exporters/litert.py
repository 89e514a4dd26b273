"""The network for LiteRT (TensorFlow Lite), in int8, from the same plan as network.int8.onnx.

Written with the schema that comes with the runtime; TensorFlow is not needed. Levels are those of
the plan less 128, as LiteRT has int8 without uint8. Channels come last.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from metamix_jax.errors import UserError
from metamix_jax.exporters.graph import IMAGE, Graph, Node
from metamix_jax.exporters.integer_plan import (
    GATE,
    GATE_FROM,
    HIGHEST,
    Plan,
    Step,
    Storage,
    levels_of,
)

MOST_BIAS = 2.0**30  # of int32
MOST_INT8 = 127
HALF = 128
SIGMOID = Storage(1 / 256, 0)  # what LiteRT's kernel writes
SCORES_MARGIN = 1.25  # of the range of scores on calibration images
VERSION = 3  # of the file format
NO_DIGEST = "0" * 64  # stands in the file while its SHA-256 digest is taken
INT8_VERSION = 2  # of most operators, as of which they take int8
VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "RESHAPE": 1}


def require_litert() -> Any:
    """Returns the module of LiteRT's schema; raises UserError if it is not installed."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise UserError(
            "config.export.litert needs ai-edge-litert: pip install 'metamix_jax[litert]'"
        ) from error
    return schema_py_generated


def litert_model(graph: Graph, plan: Plan, scores: tuple[float, float]) -> bytes:
    """Returns the model: float32 `image` [n, h, w, c] -> `scores` [n, num_classes].

    Args:
      graph: its input and output.
      plan: for integer kernels.
      scores: least and greatest on training images.
    """
    writer = _Writer(plan, graph)
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


def is_undamaged(content: bytes) -> bool:
    """Returns whether a file is as `litert_model` wrote it."""
    found = re.search(rb'"sha256": "([0-9a-f]{64})"', content)
    if found is None:
        return False
    start, stop = found.span(1)
    blank = content[:start] + NO_DIGEST.encode() + content[stop:]
    return hashlib.sha256(blank).hexdigest() == found[1].decode()


class _Writer:
    """Collects tensors, constants and operators; `levels` are the tensors as stored."""

    def __init__(self, plan: Plan, graph: Graph):
        self.schema = require_litert()
        self.storage, self._streams = dict(plan.storage), plan.streams
        self.shapes = {IMAGE: graph.image_shape}
        self.levels: dict[str, int] = {}
        self._tensors, self._operators = [], []
        self._buffers, self._codes = [self.schema.BufferT()], {}
        self._graph = graph

    # Tensors --------------------------------------------------------------------------------------

    def tensor(self, name: str, shape: Sequence[int], storage: Storage | None = None) -> int:
        """Adds a tensor [n, ...], of int8 if it is stored; returns its number."""
        found = self._tensor(name, (1, *shape), "INT8" if storage else "FLOAT32", 0)
        found.shapeSignature = [-1, *shape]
        if storage:
            found.quantization = self._scale([storage.step], [storage.zero - HALF])
        return len(self._tensors) - 1

    def constant(
        self, name: str, value: np.ndarray, steps: Any = None, zeros: Any = None, axis: int = 0
    ) -> int:
        """Adds a constant, quantized if there are steps; returns its number."""
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        self._buffers.append(buffer)
        kind = {"int8": "INT8", "int32": "INT32"}[value.dtype.name]
        found = self._tensor(name, value.shape, kind, len(self._buffers) - 1)
        if steps is not None:
            found.quantization = self._scale(steps, zeros)
            found.quantization.quantizedDimension = axis
        return len(self._tensors) - 1

    def _tensor(self, name: str, shape: Sequence[int], kind: str, buffer: int) -> Any:
        found = self.schema.TensorT()
        found.name, found.shape = name.encode(), [int(side) for side in shape]
        found.type, found.buffer = getattr(self.schema.TensorType, kind), buffer
        self._tensors.append(found)
        return found

    def _scale(self, steps: Any, zeros: Any) -> Any:
        found = self.schema.QuantizationParametersT()
        found.scale = [float(step) for step in np.float32(steps)]
        found.zeroPoint = [int(zero) for zero in zeros]
        return found

    # Operators ------------------------------------------------------------------------------------

    def add(self, op: str, inputs: Sequence[int], output: int, options: Any = None) -> int:
        """Adds an operator; returns its output."""
        self._codes.setdefault(op, len(self._codes))
        found = self.schema.OperatorT()
        found.opcodeIndex, found.inputs, found.outputs = self._codes[op], list(inputs), [output]
        if options is not None:
            name = type(options).__name__.removesuffix("T")
            found.builtinOptionsType = getattr(self.schema.BuiltinOptions, name)
            found.builtinOptions = options
        self._operators.append(found)
        return output

    def options(self, kind: str, **fields: Any) -> Any:
        """Returns the options of an operator."""
        found = getattr(self.schema, f"{kind}OptionsT")()
        for name, value in fields.items():
            assert hasattr(found, name), name
            setattr(found, name, value)
        return found

    def clipped(self, name: str, shape: Sequence[int], emit: Any, storage: Any = None) -> int:
        """Adds what `emit(output)` adds, and the bounds of the levels it is stored at."""
        storage = storage or self.storage[name]
        shape = tuple(shape)
        found = emit(self.tensor(f"{name}/wide", shape, storage))
        for op, bound, end in (("MINIMUM", storage.high, HIGHEST), ("MAXIMUM", storage.low, 0)):
            if bound != end:
                level = np.int8([bound - HALF])
                limit = self.constant(
                    f"{name}/{op.lower()}/level", level, [storage.step], [storage.zero - HALF]
                )
                output = self.tensor(f"{name}/{op.lower()}", shape, storage)
                found = self.add(op, [found, limit], output, self.options("MaximumMinimum"))
        self.levels[name], self.shapes[name] = found, shape
        return found

    def reshaped(
        self, x: int, name: str, shape: Sequence[int], storage: Storage | None = None
    ) -> int:
        """Adds the same levels in another shape, or read in another way."""
        own = self._tensors[x].quantization
        output = self.tensor(name, shape, storage or GATE)
        if storage is None:
            self._tensors[output].quantization = own
        sides = self.constant(f"{name}/shape", np.int32([-1, *shape]))
        return self.add("RESHAPE", [x, sides], output, self.options("Reshape"))

    def mapped(
        self, levels: int, name: str, shape: Sequence[int], read: Storage, write: Storage
    ) -> int:
        """Adds levels read in one way and written in another."""
        same = self.reshaped(levels, f"{name}/read", shape, read)
        return self.clipped(name, shape, lambda out: self.add("QUANTIZE", [same], out), write)

    def padded(
        self, x: int, name: str, shape: Sequence[int], margins: Any, storage: Storage, fill: int
    ) -> tuple[int, tuple[int, ...]]:
        """Adds margins around height, width and channels, of the level `fill`."""
        whole = tuple(side + sum(pair) for side, pair in zip(shape, margins, strict=True))
        places = self.constant(f"{name}/margins", np.int32([(0, 0), *margins]))
        level = np.int8([fill - HALF])
        value = self.constant(f"{name}/fill", level, [storage.step], [storage.zero - HALF])
        output = self.tensor(name, whole, storage)
        return self.add("PADV2", [x, places, value], output, self.options("PadV2")), whole

    def layer_input(self, node: Node) -> tuple[int, Storage, float]:
        """Returns the levels of a layer's input, and a shift added before they were taken."""
        (name,), quantizer = node.inputs, node.quantizer
        stored = self.storage[name]
        if quantizer is None or name not in self._streams:
            return self.levels[name], stored, 0.0
        own = levels_of(quantizer)
        read = stored._replace(zero=stored.zero - round(quantizer.shift / stored.step))
        shape = self.shapes[name]
        found = self.mapped(self.levels[name], f"{node.name}/input", shape, read, own)
        return found, own, quantizer.shift

    def finish(self, image: int, scores: int) -> bytes:
        """Returns the content of the file."""
        import flatbuffers  # comes with the schema

        schema = self.schema
        model, subgraph = schema.ModelT(), schema.SubGraphT()
        subgraph.tensors, subgraph.operators = self._tensors, self._operators
        subgraph.inputs, subgraph.outputs, subgraph.name = [image], [scores], b"main"
        model.version, model.subgraphs, model.buffers = VERSION, [subgraph], self._buffers
        facts = {name: getattr(self._graph, name) for name in ("model", "mean", "std")}
        model.description = json.dumps({"metamix_jax": facts, "sha256": NO_DIGEST}).encode()
        model.operatorCodes = []
        for op in self._codes:
            code, found = getattr(schema.BuiltinOperator, op), schema.OperatorCodeT()
            found.builtinCode, found.version = code, VERSIONS.get(op, INT8_VERSION)
            found.deprecatedBuiltinCode = min(code, MOST_INT8)
            model.operatorCodes.append(found)
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        content = bytes(builder.Output())
        digest = f'"{hashlib.sha256(content).hexdigest()}"'
        return content.replace(f'"{NO_DIGEST}"'.encode(), digest.encode(), 1)


def _layer(writer: _Writer, step: Step) -> None:
    node, name = step.node, step.output
    x, storage, shift = writer.layer_input(node)
    shape = writer.shapes[node.inputs[0]]
    padding = node.options["padding"] if node.op == "conv" else ((0, 0), (0, 0))
    if shift and np.any(padding):
        # Padding represents 0, which only a level can; inside, the bias corrects the rest.
        storage = storage._replace(zero=round(shift / storage.step))
        shift -= storage.zero * storage.step
        x = writer.reshaped(x, f"{node.name}/x", shape, storage)
    sums = step.levels.reshape(-1, step.levels.shape[-1]).sum(axis=0, dtype=np.int64)
    bias = step.bias - shift * sums * step.step
    if node.op == "dense":  # as a convolution, whose kernels may have a step per feature
        x, shape = writer.reshaped(x, f"{node.name}/features", (1, 1, *shape)), (1, 1, *shape)
    if np.any(padding):
        margins = (*padding, (0, 0))
        x, shape = writer.padded(x, f"{node.name}/pad", shape, margins, storage, storage.zero)
    kernel, bias, depthwise = _integers(writer, node, step, bias, storage)
    stride = node.options.get("stride", 1)
    fields = {"strideH": stride, "strideW": stride, "padding": writer.schema.Padding.VALID,
              "dilationHFactor": 1, "dilationWFactor": 1}  # fmt: skip
    if depthwise:
        op, options = "DEPTHWISE_CONV_2D", writer.options("DepthwiseConv2D", **fields)
        options.depthMultiplier = 1
    else:
        op, options = "CONV_2D", writer.options("Conv2D", **fields)
    wanted = node.shape if len(node.shape) == 3 else (1, 1, *node.shape)  # noqa: PLR2004  images
    found = writer.clipped(
        name, wanted, lambda out: writer.add(op, [x, kernel, bias], out, options)
    )
    if len(node.shape) == 1:
        writer.levels[name] = writer.reshaped(found, f"{name}/flat", node.shape)
        writer.shapes[name] = node.shape


def _integers(
    writer: _Writer, node: Node, step: Step, bias: np.ndarray, x: Storage
) -> tuple[int, int, bool]:
    """Adds a kernel and a bias; also returns whether the layer is depthwise."""
    largest = max(int(np.abs(step.levels).max(initial=0)), 1)
    factor = MOST_INT8 // largest
    least = np.maximum(np.abs(bias) / (MOST_BIAS * x.step), np.finfo(np.float32).tiny)
    own = np.float32(np.maximum(step.step / factor, least))
    levels = np.rint(step.levels * (step.step / own)).astype(np.int8)
    if node.op == "dense":
        levels = levels[None, None]
    depthwise = levels.shape[2] == 1 and node.options.get("groups", 1) == levels.shape[3] > 1
    levels = levels.transpose(2, 0, 1, 3) if depthwise else levels.transpose(3, 0, 1, 2)
    zeros, axis = np.zeros(own.size, int), 3 if depthwise else 0
    kernel = writer.constant(f"{node.name}/kernel", levels, own, zeros, axis)
    product = np.float64(own) * np.float32(x.step)
    content = np.rint(bias / product).astype(np.int32)
    return kernel, writer.constant(f"{node.name}/bias", content, product, zeros), depthwise


def _between(op: str, options: str):
    """Returns how to emit an operation on stored tensors."""

    def emit(writer: _Writer, step: Step) -> None:
        inputs = [writer.levels[name] for name in step.node.inputs]
        kind = writer.options(options)
        writer.clipped(step.output, step.node.shape, lambda out: writer.add(op, inputs, out, kind))

    return emit


def _mean(writer: _Writer, step: Step) -> None:
    axes = writer.constant(f"{step.output}/axes", np.int32([1, 2]))
    inputs, options = [writer.levels[step.node.inputs[0]], axes], writer.options("Reducer")
    options.keepDims = True
    writer.clipped(
        step.output, step.node.shape, lambda out: writer.add("MEAN", inputs, out, options)
    )


def _rectifier(writer: _Writer, step: Step) -> None:
    (x,), storage = step.node.inputs, writer.storage
    read, write = storage[x], storage[step.output]
    writer.mapped(writer.levels[x], step.output, writer.shapes[x], read, write)


def _sigmoid(writer: _Writer, step: Step) -> None:
    (x,), shape = step.node.inputs, step.node.shape
    wide = writer.tensor(f"{step.output}/256", shape, SIGMOID)
    writer.add("LOGISTIC", [writer.levels[x]], wide)
    writer.clipped(step.output, shape, lambda out: writer.add("QUANTIZE", [wide], out))


def _gate(writer: _Writer, step: Step, name: str, write: Storage) -> int:
    """Adds clip(x / 6 + 1 / 2, 0, 1): reading levels in another way, and the ends of the levels."""
    (x,) = step.node.inputs
    stored = writer.storage[x]
    read = Storage(stored.step / (2 * GATE_FROM), stored.zero - round(GATE_FROM / stored.step))
    return writer.mapped(writer.levels[x], name, writer.shapes[x], read, write)


def _hard_sigmoid(writer: _Writer, step: Step) -> None:
    _gate(writer, step, step.output, writer.storage[step.output])


def _hswish(writer: _Writer, step: Step) -> None:
    gate = _gate(writer, step, f"{step.output}/gate", GATE)
    inputs, options = [writer.levels[step.node.inputs[0]], gate], writer.options("Mul")
    writer.clipped(
        step.output, step.node.shape, lambda out: writer.add("MUL", inputs, out, options)
    )


def _max_pool(writer: _Writer, step: Step) -> None:
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


def _subsample(writer: _Writer, step: Step) -> None:
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


def _flatten(writer: _Writer, step: Step) -> None:
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
