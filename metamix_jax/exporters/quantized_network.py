"""Quantized networks from Python: load, calibrate, evaluate, export.

import metamix_jax
metamix_jax.export("runs/digits", "digits_export")          # a finished run

policy = metamix_jax.load_policy("runs/a/policy.json")      # for config.pretrained weights
network = metamix_jax.quantize(config, policy)
print(metamix_jax.evaluate(network))
metamix_jax.export(network, "a_export")
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from metamix_jax import recipes
from metamix_jax.data import batching
from metamix_jax.data.splits import Split
from metamix_jax.errors import UserError
from metamix_jax.exporters import (
    bundle,
    card,
    integer_runtime,
    litert,
    litert_reader,
    onnx_files,
    onnx_reader,
)
from metamix_jax.exporters.build import build_graph
from metamix_jax.exporters.evaluation import evaluate as evaluate_scores
from metamix_jax.exporters.evaluation import evaluate_graph
from metamix_jax.exporters.graph import Graph
from metamix_jax.exporters.stablehlo import stablehlo
from metamix_jax.networks.precision import Precision
from metamix_jax.runtime import sharding
from metamix_jax.selection import policy as policy_lib
from metamix_jax.selection.policy import Policy
from metamix_jax.training import setup
from metamix_jax.training.evaluator import Evaluator
from metamix_jax.training.given import Given
from metamix_jax.training.start_weights import load_calibrated, load_checkpoint
from metamix_jax.workdir import bucket
from metamix_jax.workdir.files import write_bytes_atomic

EXPORT_DIRECTORY = "export"  # in a workdir
ONNX_SUFFIX, LITERT_SUFFIX = ".onnx", ".tflite"


@dataclasses.dataclass(frozen=True)
class QuantizedNetwork:
    """A network with activations and weights quantized to the bit-widths of a policy.

    variables: params, batch_stats and quant.
    given: what a Python program handed over: its network and data.
    """

    config: ConfigDict
    network: setup.Network
    variables: Mapping[str, Any]
    policy: Policy
    given: Given = Given()

    @property
    def precision(self) -> Precision:
        """The precision of its layers, for the forward pass."""
        return Precision("chosen", "quantized", self.policy.branches(self.network.costs))

    def graph(self) -> Graph:
        """Returns the graph for export."""
        options = self.config.data
        return build_graph(
            self.network.model,
            self.variables,
            self.policy,
            image_shape=self.network.image_shape,
            mean=options.mean,
            std=options.std,
        )


Source = QuantizedNetwork | str | Path  # a path is a workdir with its config.json


def load_policy(path: str | Path) -> Policy:
    """Reads a policy.json, or that of a workdir; raises UserError.

    Whether it fits a network is only checked when it is used with one.
    """
    path = bucket.path_of(path)
    return policy_lib.load_policy(path / "policy.json" if path.is_dir() else path)


def quantize(
    config: ConfigDict,
    policy: Policy,
    *,
    model: Any = None,
    variables: Mapping[str, Any] | None = None,
    data: tuple[Any, Any] | None = None,
) -> QuantizedNetwork:
    """Returns a trained network at a policy's bits, calibrated but not trained further.

    Step sizes come from the first training batch (config.batch_size images); batch norm statistics
    are re-estimated if config.eval.bn_reestimate_batches > 0. Raises UserError.

    Args:
      config: from `load_config`; its `pretrained` names the weights.
      policy: from `load_policy`.
      model: as for `train`.
      variables: as for `train`.
      data: as for `train`.
    """
    given = Given(model, variables, data)
    config = given.named(config)
    network = setup.make_network(config, model, searches=False)
    policy.check(network.costs, "policy")
    mesh = sharding.make_mesh()
    dataset = setup.load_dataset(config, mesh, data)
    weights = given.weights(setup.abstract_variables(network))
    state = load_calibrated(config, network, dataset, mesh, weights)
    found = QuantizedNetwork(config, network, state.variables, policy, given)
    return _settled(found, Evaluator(network.model, dataset, config, mesh))


def restore(config: ConfigDict, workdir: Path, given: Given | None = None) -> QuantizedNetwork:
    """Returns the quantized network of a checkpoint, as evaluated by --mode=evaluate.

    The checkpoint is the one at config.checkpoint, or the newest in `workdir`.

    Raises:
      UserError: no such checkpoint, or its weights are not quantized yet.
    """
    given = given or Given()
    config = given.named(config)
    network = setup.make_network(config, given.model, searches=False)
    mesh = sharding.make_mesh()
    dataset = setup.load_dataset(config, mesh, given.data)
    trained = load_checkpoint(config, network, workdir, len(dataset.train), mesh)
    if trained.policy is None or trained.phase.evaluation.weights != "quantized":
        raise UserError(
            f"{trained.name} is of phase {trained.phase.name}, whose weights are not quantized; "
            "expected a checkpoint of weight_training: finish training first"
        )
    found = QuantizedNetwork(config, network, trained.variables, trained.policy, given)
    if trained.finished:  # its statistics are final
        return found
    return _settled(found, Evaluator(network.model, dataset, config, mesh))


def _settled(network: QuantizedNetwork, evaluator: Evaluator) -> QuantizedNetwork:
    if not network.config.eval.bn_reestimate_batches:
        return network
    statistics = evaluator.reestimate(network.variables, network.precision)
    variables = dict(network.variables) | {"batch_stats": statistics}
    return dataclasses.replace(network, variables=variables)


def _network(source: Source, model: Any, data: tuple[Any, Any] | None) -> QuantizedNetwork:
    if isinstance(source, QuantizedNetwork):
        given = dataclasses.replace(source.given, data=data or source.given.data)
        return dataclasses.replace(source, given=given)
    workdir = bucket.path_of(source)
    return restore(recipes.from_workdir(workdir), workdir, Given(model, data=data))


def evaluate(
    source: Source, *, model: Any = None, data: tuple[Any, Any] | None = None
) -> dict[str, Any]:
    """Returns top1, top5, correct, examples and loss of a quantized network on its data set.

    Args:
      source: a quantized network, or a workdir (its newest checkpoint).
      model: the network of a workdir whose run was given one, as for `train`.
      data: likewise; of a quantized network, other data.

    Raises:
      UserError: see `restore`.
    """
    found = _network(source, model, data)
    mesh = sharding.make_mesh()
    dataset = setup.load_dataset(found.config, mesh, found.given.data)
    evaluator = Evaluator(found.network.model, dataset, found.config, mesh)
    return evaluator(sharding.replicate(found.variables, mesh), found.precision)


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
    found, directory = _network(source, model, data), Path(directory).expanduser()
    graph, config = found.graph(), found.config
    dataset = setup.load_dataset(config, sharding.make_mesh(), found.given.data)
    contents = bundle.encode(graph)
    if config.export.litert:
        litert.require_litert()
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
    reason = integer_runtime.obstacle(graph)
    if reason:
        wanted = {card.INT8: config.export.onnx, card.LITERT: config.export.litert}
        logging.warning("no %s: %s", " or ".join(n for n in wanted if wanted[n]), reason)
        return {}
    # Of all classes: a folder's images are sorted by class.
    count = min(config.export.calibration_images, len(train))
    chosen = np.sort(np.random.default_rng(0).choice(len(train), count, replace=False))
    pixels, files = train.gather(chosen)[0], {}
    if config.export.onnx:
        pair = integer_runtime.integer_files(graph, pixels)
        files |= dict(zip((card.INT8, card.INT4), pair, strict=True))
    if config.export.litert:
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
