"""How long every layer of network.int8.onnx takes in onnxruntime, at each of its candidates."""

import collections
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metamix_jax.exporters import integer_plan
from metamix_jax.exporters.graph import IMAGE, Graph, Node
from metamix_jax.exporters.integer_plan import Step
from metamix_jax.exporters.integer_runtime import channels_first, session
from metamix_jax.exporters.nodes import REPEATED
from metamix_jax.runtime.progress import Progress

WARM_UP = 2  # rounds that do not count


class Times(NamedTuple):
    """Milliseconds of one image.

    whole: of the network, measured by itself.
    layers: layer -> its kernels'; they and `rest` add up to `whole`.
    spread: layer -> half the distance between the quartiles.
    rest: of all other kernels.
    """

    whole: float
    layers: Mapping[str, float]
    spread: Mapping[str, float]
    rest: float


def layer_times(
    graphs: Mapping[str, Graph],
    files: Mapping[str, bytes],
    *,
    rounds: int,
    batch_size: int,
    threads: int,
) -> dict[str, Times]:
    """Returns the times of each network; their calls are interleaved.

    Args:
      graphs: by name.
      files: name -> its network.int8.onnx.
      rounds: calls of each.
      batch_size: images a call.
      threads: of onnxruntime; 0: one for each core.
    """
    shape = next(iter(graphs.values())).image_shape
    images = np.random.default_rng(0).normal(size=(batch_size, *shape)).astype(np.float32)
    inputs = {IMAGE: channels_first(images)}
    seconds = {name: [] for name in files}
    with tempfile.TemporaryDirectory() as folder:
        plain = {name: session(content, threads) for name, content in files.items()}
        timed = {
            name: session(content, threads, profile=f"{folder}/{number}")
            for number, (name, content) in enumerate(files.items())
        }
        total = rounds + WARM_UP
        with Progress(total, 0, batch_size * len(files), "measuring") as progress:
            for number in range(total):
                for name in files:
                    began = time.perf_counter()
                    plain[name].run(None, inputs)
                    seconds[name].append(time.perf_counter() - began)
                    timed[name].run(None, inputs)
                progress.update(number + 1)
        kernels = {name: _kernels(Path(run.end_profiling())) for name, run in timed.items()}
    found = {}
    for name, graph in graphs.items():
        whole = 1e3 * statistics.median(seconds[name][WARM_UP:]) / batch_size
        found[name] = _attributed(kernels[name], integer_plan.fold(graph.nodes), whole)
    return found


def _kernels(path: Path) -> dict[str, list[float]]:
    """Returns kernel -> its duration in each round, from a profile of onnxruntime."""
    found = collections.defaultdict(list)
    for event in json.loads(path.read_text(encoding="utf-8")):
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"]:
            found[name].append(float(event["dur"]))
    return {name: times[WARM_UP:] for name, times in found.items()}


def _attributed(
    kernels: Mapping[str, Sequence[float]], steps: Sequence[Step], whole: float
) -> Times:
    """Returns what every layer takes of the whole.

    Reading the clock lengthens each kernel by about the same; that is taken off again.
    """
    total = {name: statistics.median(times) for name, times in kernels.items()}
    clock = min(min(total.values()), max(0.0, sum(total.values()) - 1e3 * whole) / len(total))
    scale = 1e3 * whole / max(sum(total.values()) - clock * len(total), 1e-9)
    owners = _owners(steps)
    own: dict[str, list[Sequence[float]]] = collections.defaultdict(list)
    for name, times in kernels.items():
        own[owner(name, owners)].append(times)
    sums = {
        layer: scale * (np.sum(rows, axis=0) - clock * len(rows)) for layer, rows in own.items()
    }
    layers = dict.fromkeys(filter(None, (_layer(step.node) for step in steps)))
    quartiles = {
        layer: np.percentile(sums[layer], (25, 50, 75)) / 1e3 if layer in sums else np.zeros(3)
        for layer in layers
    }
    medians = {layer: max(float(found[1]), 0.0) for layer, found in quartiles.items()}
    spread = {layer: float(found[2] - found[0]) / 2 for layer, found in quartiles.items()}
    return Times(whole, medians, spread, max(whole - sum(medians.values()), 0.0))


def _owners(steps: Sequence[Step]) -> dict[str, str]:
    """Returns the start of kernels' names -> the layer that they belong to, "" for none."""
    takers = collections.defaultdict(list)
    for step in steps:
        for name in step.node.inputs:
            takers[name].append(step.node)
    found = {IMAGE: ""}
    for step in steps:
        layer = _layer(step.node)
        found[step.output] = layer
        if layer:
            found[f"{step.node.name}/"] = layer  # its input and kernel
    for name, nodes in takers.items():
        # Clipped to the width of the one layer that takes it.
        if len(nodes) == 1 and _layer(nodes[0]):
            found[f"{name}/levels"] = _layer(nodes[0])
    return found


def _layer(node: Node) -> str:
    """Returns the layer that a node is a run of; "" for other nodes."""
    return node.name.partition(REPEATED)[0] if node.kernel or node.op == "product" else ""


def owner(kernel: str, owners: Mapping[str, str]) -> str:
    """Returns the layer that a kernel belongs to, "" for none, by the longest start of its name."""
    fits = [
        start for start in owners
        if kernel.startswith(start if start.endswith("/") else f"{start}/") or kernel == start
    ]  # fmt: skip
    return owners[max(fits, key=len)] if fits else ""
