"""The files of an exported network: written, read back and evaluated."""

import logging
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from metamix_jax.data import batching
from metamix_jax.data.splits import Split
from metamix_jax.errors import UserError
from metamix_jax.exporters import (
    bundle,
    card,
    integer_runtime,
    litert_reader,
    onnx_files,
    onnx_reader,
)
from metamix_jax.exporters.evaluation import evaluate as evaluate_scores
from metamix_jax.exporters.evaluation import evaluate_graph
from metamix_jax.exporters.graph import Graph
from metamix_jax.exporters.quantized_network import QuantizedNetwork, Source, opened
from metamix_jax.exporters.stablehlo import stablehlo
from metamix_jax.runtime import sharding
from metamix_jax.training import setup
from metamix_jax.workdir.files import write_bytes_atomic

EXPORT_DIRECTORY = "export"  # in a workdir
ONNX_SUFFIX, LITERT_SUFFIX = ".onnx", ".tflite"


def export(
    source: Source,
    directory: str | Path,
    *,
    model: Any = None,
    data: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Writes the integer bundle, ONNX, StableHLO and a model card into `directory`.

    Args:
      source: a quantized network, or a workdir (its newest checkpoint).
      directory: created if missing; files of the same names are replaced.
      model: the network of a workdir whose run was given one, as for `train`.
      data: likewise.

    Returns:
      Counts of the bundle, read back from the files, on the first config.export.examples evaluation
      images: correct, correct_top5, examples, reference_correct, differing; `files`, name -> bytes;
      and `integer` and `litert`, likewise of the files for integer kernels, with their speed.

    Raises:
      UserError: see `restore`; or onnx is not installed, or the directory cannot be written.
    """
    found, directory = opened(source, model, data), Path(directory).expanduser()
    graph, config = found.graph(), found.config
    dataset = setup.load_dataset(config, sharding.make_mesh(), found.given.data)
    contents = bundle.encode(graph)
    if config.export.onnx:
        contents[card.QCDQ] = onnx_files.qcdq_model(graph)
        contents[card.QONNX] = onnx_files.qonnx_model(graph)
    if config.export.onnx or config.export.litert:
        contents |= _integer_files(graph, dataset.train, config)
    model, shape = found.network.model, found.network.image_shape
    contents[card.STABLEHLO] = stablehlo(model, found.variables, found.precision, shape)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_bytes_atomic(directory / name, content)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror})") from error
    sizes = {name: len(content) for name, content in contents.items()}
    bundled, examples = bundle.read_bundle(directory), config.export.examples
    predict = _prediction(found)
    counts = evaluate_graph(bundled, dataset.evaluation, examples, predict)
    integer = None
    if card.INT8 in contents:
        scores = onnx_reader.read(directory / card.INT8).scores
        integer = evaluate_scores(scores, dataset.evaluation, examples, predict)
        integer |= integer_runtime.measured(graph, {name: contents[name] for name in card.TIMED})
    mobile = None
    if card.LITERT in contents:
        network = litert_reader.read(directory / card.LITERT)
        mobile = evaluate_scores(network.scores, dataset.evaluation, examples, predict)
        mobile |= {"milliseconds": network.milliseconds()}
    text = card.card(
        graph,
        sizes,
        counts,
        integer,
        mobile,
        data=f"{config.data.name} ({(dataset.split_names or [config.data.eval_split])[-1]})",
        class_names=dataset.class_names,
        pretrained=config.pretrained,
        licence=config.export.licence,
        versions={name: metadata.version(name) for name in ("jax", "flax", "numpy")},
    )
    write_bytes_atomic(directory / "README.md", text.encode())
    logging.info("%s:\n%s", directory, text)
    return counts | {"files": sizes, "integer": integer, "litert": mobile}


def _integer_files(graph: Graph, train: Split, config: ConfigDict) -> dict[str, bytes]:
    """Returns the files for integer kernels, if there can be any."""
    reasons = {
        name: reason
        for name, wanted, reason in (
            (card.INT8, config.export.onnx, integer_runtime.obstacle()),
            (card.LITERT, config.export.litert, integer_runtime.litert_obstacle(graph)),
        )
        if wanted
    }
    for name, reason in reasons.items():
        if reason:
            logging.warning("no %s: %s", name, reason)
    possible = {name for name, reason in reasons.items() if not reason}
    if not possible:
        return {}
    # Of all classes: a folder's images are sorted by class.
    count = min(config.export.calibration_images, len(train))
    chosen = np.sort(np.random.default_rng(0).choice(len(train), count, replace=False))
    pixels, files = train.gather(chosen)[0], {}
    if card.INT8 in possible:
        pair = integer_runtime.integer_files(graph, pixels)
        files |= dict(zip((card.INT8, card.INT4), pair, strict=True))
    if card.LITERT in possible:
        files[card.LITERT] = integer_runtime.litert_file(graph, pixels)
    return files


def evaluate_exported(config: ConfigDict, path: Path) -> dict[str, Any]:
    """Returns top1, top5, correct, correct_top5 and examples of an exported network.

    Uses the first config.export.examples evaluation images. A bundle, given as its directory, runs
    in NumPy, an ONNX file in onnxruntime, a LiteRT file in LiteRT. Raises UserError if it is
    damaged or its images or classes differ from config.data's.
    """
    if path.is_dir():
        network = bundle.read_bundle(path)
    else:
        reader = litert_reader if path.suffix == LITERT_SUFFIX else onnx_reader
        network = reader.read(path)
    size = config.data.image_size
    wanted = (size, size, config.data.channels), config.data.num_classes
    if (network.image_shape, network.num_classes) != wanted:
        raise UserError(
            f"{path} takes images of {network.image_shape} for {network.num_classes} classes, "
            f"not config.data's {wanted[0]} for {wanted[1]}"
        )
    split = setup.load_dataset(config, sharding.make_mesh()).evaluation
    if isinstance(network, Graph):
        return evaluate_graph(network, split, config.export.examples)
    return evaluate_scores(network.scores, split, config.export.examples)


def _prediction(found: QuantizedNetwork) -> Callable[[jax.Array], jax.Array]:
    """Returns a function from pixels to the network's predicted classes, in JAX."""
    variables, precision, options = found.variables, found.precision, found.config.data

    @jax.jit
    def predict(pixels: jax.Array) -> jax.Array:
        images = batching.preprocess(pixels, mean=options.mean, std=options.std)
        scores = found.network.model.apply(variables, images, train=False, precision=precision)
        return scores.argmax(axis=-1)

    return predict
