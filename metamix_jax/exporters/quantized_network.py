"""Quantized networks from Python: load, calibrate, evaluate; see exported.py for their files.

import metamix_jax
metamix_jax.export("runs/digits", "digits_export")          # a finished run

policy = metamix_jax.load_policy("runs/a/policy.json")      # for config.pretrained weights
network = metamix_jax.quantize(config, policy)
print(metamix_jax.evaluate(network))
metamix_jax.export(network, "a_export")
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax import recipes
from metamix_jax.errors import UserError
from metamix_jax.exporters.build import build_graph
from metamix_jax.exporters.graph import Graph
from metamix_jax.networks.precision import Precision
from metamix_jax.runtime import sharding
from metamix_jax.selection import policy as policy_lib
from metamix_jax.selection.policy import Policy
from metamix_jax.training import setup
from metamix_jax.training.evaluator import Evaluator
from metamix_jax.training.given import Given
from metamix_jax.training.start_weights import load_calibrated, load_checkpoint
from metamix_jax.workdir import bucket


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


def opened(source: Source, model: Any, data: tuple[Any, Any] | None) -> QuantizedNetwork:
    """Returns the network of a workdir, or the one given, with other data if there is any."""
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
    found = opened(source, model, data)
    mesh = sharding.make_mesh()
    dataset = setup.load_dataset(found.config, mesh, found.given.data)
    evaluator = Evaluator(found.network.model, dataset, found.config, mesh)
    return evaluator(sharding.replicate(found.variables, mesh), found.precision)
