"""The ONNX files in onnxruntime: ranges for integer kernels, what runs as one, accuracy, speed."""

import collections
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metamix_jax.exporters import (
    integer_onnx,
    integer_plan,
    integer_products,
    litert,
    onnx_files,
)
from metamix_jax.exporters.graph import IMAGE, Graph, normalise
from metamix_jax.exporters.integer_plan import Plan

BATCH = 8  # images per call
REPEATS = 15  # of every timed call
# Of an optimized model: on integers, or on the bytes as they are.
INTEGER_OPS = frozenset({
    "Cast", "Clip", "Concat", "DequantizeLinear", "Expand", "Flatten", "Identity",
    "MatMulIntegerToFloat", "MaxPool", "NhwcMaxPool", "Pad", "QGemm", "QuantizeLinear", "Reshape",
    "Shape", "Slice", "Transpose",
})  # fmt: skip


def obstacle() -> str:
    """Returns why there are no files for integer kernels, "" if there are."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "its ranges need onnxruntime: pip install 'metamix_jax[export]'"
    return ""


def integer_files(graph: Graph, pixels: np.ndarray) -> tuple[bytes, bytes]:
    """Returns the model for integer kernels, with weights stored at 8 bits and at 4.

    Args:
      graph: without an `obstacle`.
      pixels: training images, uint8 [n, h, w, c], for the ranges.
    """
    if integer_plan.unsupported(graph):
        ranges = _ranges(graph, integer_products.convolutions(graph), normalise(pixels, graph))
        return tuple(
            integer_products.products_model(graph, ranges, packed) for packed in (False, True)
        )
    plan, _ = _planned(graph, pixels)
    return tuple(integer_onnx.integer_model(graph, plan, packed) for packed in (False, True))


def litert_obstacle(graph: Graph) -> str:
    """Returns why there is no file for LiteRT, "" if there is one."""
    op = integer_plan.unsupported(graph)
    return f"{op} has no integer kernel here yet" if op else obstacle()


def litert_file(graph: Graph, pixels: np.ndarray) -> bytes:
    """Returns the model for LiteRT; arguments as in `integer_files`."""
    return litert.litert_model(graph, *_planned(graph, pixels))


def _planned(graph: Graph, pixels: np.ndarray) -> tuple[Plan, tuple[float, float]]:
    """Returns how to store the tensors, and the range of the scores."""
    steps, scores = integer_plan.fold(graph.nodes), graph.nodes[-1].name
    names = dict.fromkeys([*integer_plan.streams(steps), scores])
    ranges = _ranges(graph, list(names), normalise(pixels, graph))
    return integer_plan.plan(steps, ranges), ranges[scores]


def _ranges(
    graph: Graph, names: Sequence[str], images: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Returns the least and the greatest value of tensors of the exact model."""
    onnx = onnx_files.require_onnx()
    model = onnx.load_model_from_string(onnx_files.qcdq_model(graph))
    known = {info.name: info for info in model.graph.value_info}
    found = {IMAGE: (float(images.min()), float(images.max()))}
    wanted = [name for name in names if name != IMAGE]
    if not wanted:
        return found
    model.graph.output.extend(known[name] for name in wanted)
    run = session(model.SerializeToString(), threads=0)
    bounds = np.float64([[np.inf, -np.inf]] * len(wanted))
    for start in range(0, len(images), BATCH):
        inputs = {IMAGE: channels_first(images[start : start + BATCH])}
        for bound, values in zip(bounds, run.run(wanted, inputs), strict=True):
            bound[:] = min(bound[0], values.min()), max(bound[1], values.max())
    return found | {name: tuple(bound) for name, bound in zip(wanted, bounds, strict=True)}


def session(
    content: bytes, threads: int = 1, optimized: Path | None = None, profile: str = ""
) -> Any:
    """Returns an onnxruntime session at its default optimization level.

    Args:
      content: of an ONNX file.
      threads: 0 for all cores.
      optimized: where to write the model as it is run.
      profile: start of the name of a file for the duration of every kernel; "": none.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.enable_profiling, options.profile_file_prefix = bool(profile), profile
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def channels_first(images: np.ndarray) -> np.ndarray:
    """Returns images [n, h, w, c] as ONNX takes them, [n, c, h, w]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def kernels(content: bytes) -> dict[str, int]:
    """Returns the operations of a file as onnxruntime runs it, the most frequent first."""
    onnx = onnx_files.require_onnx()
    with tempfile.TemporaryDirectory() as folder:
        session(content, optimized=Path(folder) / "optimized.onnx")
        nodes = onnx.load(f"{folder}/optimized.onnx").graph.node
    return dict(collections.Counter(node.op_type for node in nodes).most_common())


def in_float(found: Mapping[str, int]) -> dict[str, int]:
    """Returns those of `kernels` that compute with floats."""
    return {
        op: count for op, count in found.items()
        if op not in INTEGER_OPS and not op.startswith("QLinear")
    }  # fmt: skip


def measured(graph: Graph, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Returns what the first file runs as, and the speed of all next to float32.

    Returns:
      `kernels` and `in_float`, operation -> how many; `milliseconds`, name -> of one image on one
      thread, `float32` for the same network without quantizers; `float32_bytes`.
    """
    plain = onnx_files.float_model(graph)
    found = kernels(next(iter(files.values())))
    return {
        "kernels": found, "in_float": in_float(found), "float32_bytes": len(plain),
        "milliseconds": milliseconds({"float32": plain, **files}, graph),
    }  # fmt: skip


def milliseconds(
    models: Mapping[str, bytes], graph: Graph, batch: int = 1, threads: int = 1
) -> dict[str, float]:
    """Returns the median milliseconds an image of each model; their calls are interleaved."""
    images = np.random.default_rng(0).normal(size=(batch, *graph.image_shape))
    inputs = {IMAGE: channels_first(images.astype(np.float32))}
    sessions = {name: session(content, threads) for name, content in models.items()}
    seconds = {name: [] for name in models}
    for found in sessions.values():
        found.run(None, inputs)  # allocates
    for _ in range(REPEATS):
        for name, found in sessions.items():
            began = time.perf_counter()
            found.run(None, inputs)
            seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(times) / batch for name, times in seconds.items()}
