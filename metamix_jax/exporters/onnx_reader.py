"""Reads the ONNX files that --mode=export wrote, to run them in onnxruntime."""

import ast
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from metamix_jax.errors import UserError
from metamix_jax.exporters.graph import IMAGE, normalise
from metamix_jax.exporters.integer_runtime import channels_first, session
from metamix_jax.exporters.onnx_files import DIGEST, digest, require_onnx

DAMAGED = "damaged, or not written by --mode=export; export the network again"


@dataclasses.dataclass(frozen=True)
class OnnxNetwork:
    """An ONNX file in onnxruntime; fields as in `Graph`."""

    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    session: Any

    def scores(self, pixels: np.ndarray) -> np.ndarray:
        """Returns class scores of uint8 pixels [n, h, w, c]."""
        return self.session.run(None, {IMAGE: channels_first(normalise(pixels, self))})[0]


def read(path: Path) -> OnnxNetwork:
    """Returns the network of an ONNX file.

    Raises:
      UserError: it cannot be read, is damaged or foreign, or onnxruntime does not run it.
    """
    onnx = require_onnx()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        model = onnx.load_model_from_string(content)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert facts[DIGEST] == digest(model)
        mean, std = (tuple(ast.literal_eval(facts[name])) for name in ("mean", "std"))
        sides, classes = (
            [side.dim_value for side in found[0].type.tensor_type.shape.dim]
            for found in (model.graph.input, model.graph.output)
        )
        _, channels, height, width = sides
    except Exception as error:  # protobuf raises many kinds
        raise UserError(f"{path}: {DAMAGED}") from error
    try:
        run = session(content, threads=0)
    except ImportError as error:
        raise UserError(f"{path}: needs onnxruntime: pip install 'metamix_jax[export]'") from error
    except Exception as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}: onnxruntime does not run it: {first}") from error
    return OnnxNetwork((height, width, channels), classes[-1], mean, std, run)
