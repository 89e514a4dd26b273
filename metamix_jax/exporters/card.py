"""The model card: README.md next to the exported files."""

from collections.abc import Mapping, Sequence
from typing import Any

from metamix_jax.exporters.bundle import MAGIC, SCALES, WEIGHTS
from metamix_jax.exporters.graph import Graph

STABLEHLO, QCDQ, QONNX = "network.stablehlo", "network.qcdq.onnx", "network.qonnx.onnx"
INT8, INT4 = "network.int8.onnx", "network.int4.onnx"
LITERT = "network.tflite"
TIMED = (INT8, INT4, QCDQ)
_DESCRIPTIONS = {
    "graph.json": "integer bundle: nodes, policy, activation step sizes, digests",
    "weights.bin": "integer bundle: weights at their true bit-widths",
    "scales.bin": "integer bundle: weight step sizes, biases, folded batch norm (float32)",
    INT8: "ONNX to deploy on CPUs: layers are integer kernels in onnxruntime",
    INT4: "the same, with weights of at most 4 bits stored as INT4 (opset 21)",
    LITERT: "LiteRT to deploy on phones and boards: integer kernels, channels last",
    QCDQ: "ONNX, exact: 8-bit containers, clipped to each layer's bits",
    QONNX: "QONNX for qonnx, FINN, hls4ml: `Quant` nodes at each layer's bits, batch 1",
    STABLEHLO: "StableHLO for jax.export.deserialize (cpu, cuda, tpu); readable by the JAX version "
    "that wrote it, later ones for 6 months and earlier ones for 3 weeks",
}


def card(
    graph: Graph,
    sizes: Mapping[str, int],
    counts: Mapping[str, Any],
    integer: Mapping[str, Any] | None = None,
    mobile: Mapping[str, Any] | None = None,
    *,
    data: str,
    class_names: Sequence[str],
    pretrained: str,
    licence: str,
    versions: Mapping[str, str],
) -> str:
    """Returns the model card in Markdown.

    Args:
      graph: the exported network.
      sizes: file -> bytes.
      counts: result of `evaluate_graph` on the bundle read back, with JAX as the reference.
      integer: the same for INT8, and what `integer_runtime.measured` returns; None without one.
      mobile: the same for LITERT, with `milliseconds`; None without one.
      data: name of the evaluation data.
      class_names: in the order of the scores, where they are known.
      pretrained: the weights that training started from; "" = random.
      licence: of the weights; "" = unknown.
      versions: package -> version.
    """
    height, width, channels = graph.image_shape
    weights = sum(node.kernel.levels.size for node in graph.layers)
    layers = graph.policy["layers"]
    files = "\n".join(
        f"| `{name}` | {size:,} | {_DESCRIPTIONS[name]} |" for name, size in sizes.items()
    )
    rows = "\n".join(
        f"| `{path}` | {row['act_bits']} | {row['weight_bits']} | {row['macs'] / 1e6:.3f} |"
        for path, row in layers.items()
    )
    start = f"`{pretrained}`, whose licence still applies" if pretrained else "random"
    return f"""# {graph.model}, bits chosen by {graph.policy["searcher"]}

Written by metamix_jax ({", ".join(f"{name} {version}" for name, version in versions.items())}).

- **Input**: images of {height} x {width} pixels, {_channels(channels)}, as
  `(pixel / 255 - mean) / std` with mean {list(graph.mean)} and std {list(graph.std)}.
  The ONNX files take float32 `image` [n, {channels}, {height}, {width}], the bundle and StableHLO
  [n, {height}, {width}, {channels}].
- **Output**: scores of {graph.num_classes} classes, {_order(class_names, data)}.
- **Accuracy** of the integer bundle in this directory on {counts["examples"]:,} images of
  {data}: top-1 {counts["top1"]:.2f} % ({counts["correct"]} correct),
  top-5 {counts["top5"]:.2f} %. The checkpoint in JAX: {counts["reference_correct"]} correct;
  differing predictions: {counts["differing"]}.
- **Cost**: {graph.policy["gbops"]:.6g} GBOPs per image (MACs x activation bits x weight bits of
  convolutions and dense layers).
- **Weights**: {weights:,} in {sizes[WEIGHTS]:,} bytes, including a header of {len(MAGIC)}, compared
  to {4 * weights:,} in float32 and {weights:,} in int8; {sizes[SCALES]:,} more bytes for step sizes
  and batch norm.
- **Licence of the weights**: {licence or "unknown"}. Initial weights: {start}.

{_speeds(integer, sizes)}{_mobile(mobile)}| file | bytes | |
|---|---|---|
{files}

| layer | activation bits | weight bits | million MACs |
|---|---|---|---|
{rows}
"""


def _speeds(integer: Mapping[str, Any] | None, sizes: Mapping[str, int]) -> str:
    """Returns the table of sizes and speeds, and the accuracy of INT8."""
    if integer is None:
        return ""
    times = integer["milliseconds"]
    rows = "\n".join(
        f"| `{name}` | {bytes_:,} | {times[name]:.3g} | {times['float32'] / times[name]:.2f} |"
        for name, bytes_ in [("float32", integer["float32_bytes"]), *sizes.items()]
        if name in times
    )
    kernels = ", ".join(f"{count} {op}" for op, count in integer["kernels"].items())
    floats = ", ".join(f"{count} {op}" for op, count in integer["in_float"].items())
    return f"""| in onnxruntime | bytes | ms an image | float32 / this |
|---|---|---|---|
{rows}

One image at a time on one thread of the CPU that wrote this; `float32` is the same network without
quantizers. `{INT8}` runs as {kernels}; in float: {floats or "none"}. Its top-1 is
{integer["top1"]:.2f} % ({integer["correct"]} of {integer["examples"]}), with
{integer["differing"]} predictions that differ from JAX's.

"""


def _mobile(mobile: Mapping[str, Any] | None) -> str:
    """Returns the speed and the accuracy of LITERT."""
    if mobile is None:
        return ""
    return f"""In LiteRT, `{LITERT}` takes {mobile["milliseconds"]:.3g} ms an image on one thread of
the same CPU. Its top-1 is {mobile["top1"]:.2f} % ({mobile["correct"]} of {mobile["examples"]}),
with {mobile["differing"]} predictions that differ from JAX's.

"""


def _order(class_names: Sequence[str], data: str) -> str:
    names = ", ".join(f"{i} {name}" for i, name in enumerate(class_names))
    return f"in this order: {names}" if names else f"in the order of the labels of {data}"


def _channels(count: int) -> str:
    return {1: "grey", 3: "RGB"}.get(count, f"{count} channels")
