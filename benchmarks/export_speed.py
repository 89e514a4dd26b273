"""Speed of an exported network's files, next to float32 and onnxruntime's own int8.

    python -m benchmarks.export_speed DIRECTORY [--batches=1,8] [--threads=1,2]

DIRECTORY was written by --mode=export, which chose the ranges of network.int8.onnx from training
images. `quantize_static` is onnxruntime's own int8 (QDQ, per channel) of the same network, with
ranges from noise: only its speed counts here. Calls are interleaved, and the median is taken; those
of network.tflite, in LiteRT, come after the others.
Prints the operations that run, a table of milliseconds an image, then one line of JSON.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path

import numpy as np
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from metamix_jax.exporters import bundle, card, integer_runtime, litert_reader, onnx_files
from metamix_jax.exporters.graph import IMAGE, Graph

FLOAT32, STOCK = "float32", "quantize_static"


class Noise(quantization.CalibrationDataReader):
    """A few images of noise."""

    def __init__(self, graph: Graph, count: int = 4):
        height, width, channels = graph.image_shape
        images = np.random.default_rng(0).normal(size=(count, 1, channels, height, width))
        self._images = iter(images.astype(np.float32))

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._images, None)
        return None if image is None else {IMAGE: image}


def stock_int8(graph: Graph) -> bytes:
    """Returns the network quantized by onnxruntime's own tool, batch norm folded before."""
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        plain, folded, quantized = (Path(name) / f"{i}.onnx" for i in range(3))
        plain.write_bytes(onnx_files.float_model(graph))
        quant_pre_process(plain, folded, skip_symbolic_shape=True)
        quantization.quantize_static(
            folded, quantized, Noise(graph), per_channel=True,
            quant_format=quantization.QuantFormat.QDQ,
            extra_options={"QDQDisableWeightAdjustForInt32Bias": True},
        )  # fmt: skip
        return quantized.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", default="1,2")
    options = parser.parse_args()
    graph = bundle.read_bundle(options.directory)
    models = {FLOAT32: onnx_files.float_model(graph), STOCK: stock_int8(graph)}
    try:
        integer_runtime.milliseconds({STOCK: models[STOCK]}, graph)
    except Exception as error:
        print(f"{STOCK} does not run: {error}")
        del models[STOCK]
    names = (card.INT8, card.INT4, card.QCDQ)
    models |= {
        name: (options.directory / name).read_bytes()
        for name in names if (options.directory / name).exists()
    }  # fmt: skip
    for name in (STOCK, card.INT8):
        if name in models:
            found = integer_runtime.kernels(models[name])
            print(name, "runs as", ", ".join(f"{count} {op}" for op, count in found.items()))
    others = [name for name in (FLOAT32, STOCK) if name in models]
    compared = " | ".join(f"{name} / int8" for name in others)
    path = options.directory / card.LITERT
    mobile = litert_reader.read(path) if path.exists() else None
    columns = [*models, *([card.LITERT] if mobile else [])]
    print("| threads | batch |", " | ".join(columns), "|", compared, "|")
    rows = []
    for threads in map(int, options.threads.split(",")):
        for batch in map(int, options.batches.split(",")):
            found = integer_runtime.milliseconds(models, graph, batch, threads)
            if mobile:
                found[card.LITERT] = mobile.milliseconds(batch, threads)
            rows.append({"threads": threads, "batch": batch, "milliseconds": found})
            ratios = (found[name] / found[card.INT8] for name in others)
            cells = [*(f"{value:.3g}" for value in found.values()), *(f"{r:.2f}" for r in ratios)]
            print(f"| {threads} | {batch} |", " | ".join(cells), "|")
    sizes = {name: len(content) for name, content in models.items()}
    print(json.dumps({"model": graph.model, "bytes": sizes, "rows": rows}))


if __name__ == "__main__":
    main()
