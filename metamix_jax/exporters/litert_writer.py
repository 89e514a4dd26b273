"""Writes files of LiteRT: tensors, constants and operators, with the schema of its runtime."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from metamix_jax.errors import UserError
from metamix_jax.exporters.graph import IMAGE, Graph
from metamix_jax.exporters.integer_plan import HIGHEST, Plan, Storage

HALF = 128  # levels of the plan less this are int8
MOST_CODE = 127  # what the older of two fields for an operator's code holds
VERSION = 3  # of the file format
INT8_VERSION = 2  # of most operators, as of which they take int8
VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "RESHAPE": 1}
NO_DIGEST = "0" * 64  # stands in the file while its SHA-256 digest is taken


def require_litert() -> Any:
    """Returns the module of LiteRT's schema; raises UserError if it is not installed."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise UserError(
            "config.export.litert needs ai-edge-litert: pip install 'metamix_jax[litert]'"
        ) from error
    return schema_py_generated


def is_undamaged(content: bytes) -> bool:
    """Returns whether a file is as it was written."""
    found = re.search(rb'"sha256": "([0-9a-f]{64})"', content)
    if found is None:
        return False
    start, stop = found.span(1)
    blank = content[:start] + NO_DIGEST.encode() + content[stop:]
    return hashlib.sha256(blank).hexdigest() == found[1].decode()


class LitertWriter:
    """Collects tensors, constants and operators; `levels` are the tensors as stored."""

    def __init__(self, plan: Plan, graph: Graph):
        self.schema = require_litert()
        self.plan, self.storage = plan, dict(plan.storage)
        self.shapes = {IMAGE: graph.image_shape}
        self.levels: dict[str, int] = {}
        self._tensors, self._operators = [], []
        self._buffers, self._codes = [self.schema.BufferT()], {}
        self._contents: dict[bytes, int] = {}  # of buffers -> their numbers
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
        content = np.ascontiguousarray(value).tobytes()
        number = self._contents.setdefault(content, len(self._buffers))
        if number == len(self._buffers):
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(content, np.uint8)
            self._buffers.append(buffer)
        kind = {"int8": "INT8", "int32": "INT32"}[value.dtype.name]
        found = self._tensor(name, value.shape, kind, number)
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

    def clipped(
        self,
        name: str,
        shape: Sequence[int],
        emit: Callable[[int], int],
        storage: Storage | None = None,
    ) -> int:
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
        output = self.tensor(name, shape, storage or Storage(1.0, 0))
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
            found.deprecatedBuiltinCode = min(code, MOST_CODE)
            model.operatorCodes.append(found)
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        content = bytes(builder.Output())
        digest = f'"{hashlib.sha256(content).hexdigest()}"'
        return content.replace(f'"{NO_DIGEST}"'.encode(), digest.encode(), 1)
