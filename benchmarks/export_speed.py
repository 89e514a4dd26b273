"""CPU time per image of an exported network: QCDQ and float32 in onnxruntime, NumPy executor.

    python -m benchmarks.export_speed DIRECTORY [--batches=1,16] [--repeats=15]

DIRECTORY was written by --mode=export. One thread each, at onnxruntime's default level. CPU time is
measured, which other work on the machine disturbs less than wall time; repetitions are interleaved,
and the median is taken. Prints a table, then one line of JSON.
"""

import os

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
os.environ.update(dict.fromkeys(THREADS, "1"))  # read by NumPy on import

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402

from metamix_jax.exporters import bundle, card, executor, onnx_files  # noqa: E402
from metamix_jax.exporters.graph import Graph  # noqa: E402
from metamix_jax.exporters.onnx_writers import QonnxWriter  # noqa: E402


class FloatWriter(QonnxWriter):
    """Writes kernels in real units, without quantization."""

    domain = ""

    def _quant(self, x: str, *_: Any, **__: Any) -> str:
        return x


def float_model(graph: Graph) -> bytes:
    """Returns the network as ordinary float32 ONNX."""
    nodes = tuple(dataclasses.replace(node, quantizer=None) for node in graph.nodes)
    return onnx_files.encode(dataclasses.replace(graph, nodes=nodes), FloatWriter(), "batch")


def session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    graph = bundle.read_bundle(options.directory)
    sessions = {
        "float32": session(float_model(graph)),
        "QCDQ": session((options.directory / card.QCDQ).read_bytes()),
    }
    rows = {}
    for batch in map(int, options.batches.split(",")):
        images = np.random.default_rng(0).normal(size=(batch, *graph.image_shape))
        images = images.astype(np.float32)
        inputs = {"image": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}
        forms = {
            name: lambda found=found, inputs=inputs: found.run(None, inputs)
            for name, found in sessions.items()
        }
        forms["NumPy"] = lambda images=images: executor.run(graph, images)
        seconds = {name: [] for name in forms}
        for form in forms.values():
            form()  # allocates
        for _ in range(options.repeats):
            for name, form in forms.items():
                began = time.process_time()
                form()
                seconds[name].append((time.process_time() - began) / batch)
        rows[batch] = {name: statistics.median(found) for name, found in seconds.items()}
    print("| batch |", " | ".join(f"{name}, ms an image" for name in forms), "| QCDQ / float32 |")
    for batch, found in rows.items():
        cells = " | ".join(f"{1000 * value:.3g}" for value in found.values())
        print(f"| {batch} | {cells} | {found['QCDQ'] / found['float32']:.2f} |")
    print(json.dumps({"model": graph.model, "seconds": rows}))


if __name__ == "__main__":
    main()
