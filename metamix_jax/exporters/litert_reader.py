"""Reads the LiteRT files that --mode=export wrote, to run them in LiteRT."""

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from metamix_jax.errors import UserError
from metamix_jax.exporters.graph import normalise
from metamix_jax.exporters.integer_runtime import REPEATS
from metamix_jax.exporters.litert_writer import is_undamaged, require_litert
from metamix_jax.exporters.onnx_reader import DAMAGED


@dataclasses.dataclass(frozen=True)
class LitertNetwork:
    """A LiteRT file; fields as in `Graph`."""

    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    content: bytes

    def scores(self, pixels: np.ndarray) -> np.ndarray:
        """Returns class scores of uint8 pixels [n, h, w, c]."""
        interpreter = self._interpreter(len(pixels), threads=None)
        _set(interpreter, normalise(pixels, self))
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    def milliseconds(self, batch: int = 1, threads: int = 1) -> float:
        """Returns the median milliseconds an image."""
        interpreter, seconds = self._interpreter(batch, threads), []
        _set(interpreter, np.zeros((batch, *self.image_shape), np.float32))
        for _ in range(REPEATS + 1):  # the first one allocates
            began = time.perf_counter()
            interpreter.invoke()
            seconds.append(time.perf_counter() - began)
        return 1000 * statistics.median(seconds[1:]) / batch

    def _interpreter(self, images: int, threads: int | None) -> Any:
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_content=self.content, num_threads=threads)
        place = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(place, (images, *self.image_shape))
        interpreter.allocate_tensors()
        return interpreter


def _set(interpreter: Any, images: np.ndarray) -> None:
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images)


def read(path: Path) -> LitertNetwork:
    """Returns the network of a LiteRT file.

    Raises:
      UserError: it cannot be read, is damaged or foreign, or LiteRT is not installed.
    """
    schema = require_litert()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not is_undamaged(content):
        raise UserError(f"{path}: {DAMAGED}")
    model = schema.ModelT.InitFromPackedBuf(content)
    facts, body = json.loads(model.description)["metamix_jax"], model.subgraphs[0]
    (_, *shape), (_, classes) = (
        [int(side) for side in body.tensors[place[0]].shape]
        for place in (body.inputs, body.outputs)
    )
    mean, std = (tuple(facts[name]) for name in ("mean", "std"))
    return LitertNetwork(tuple(shape), classes, mean, std, content)
