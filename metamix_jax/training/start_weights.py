"""Trained weights to start from, to distill from or to evaluate: weight files, checkpoints."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from metamix_jax.data.datasets import Dataset
from metamix_jax.errors import UserError
from metamix_jax.networks import registry, torch_weights
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.runtime import sharding
from metamix_jax.selection.phases import Phase
from metamix_jax.selection.policy import Policy, policy_of_checkpoint
from metamix_jax.training import nonfinite, setup
from metamix_jax.training.calibrate import calibrations, make_calibrate
from metamix_jax.training.checkpoints import Checkpoints, OtherNetworkError, locate
from metamix_jax.training.schedule import phase_at
from metamix_jax.training.setup import Network, abstract_variables
from metamix_jax.training.step.state import TrainState
from metamix_jax.workdir import bucket


@dataclasses.dataclass(frozen=True)
class Trained:
    """All variables of a checkpoint, and where they come from.

    policy: None if no bits are chosen yet.
    finished: whether it is the run's last checkpoint, whose batch norm statistics are final.
    """

    name: str
    step: int
    phase: Phase
    finished: bool
    policy: Policy | None
    variables: dict[str, Any]


def load_checkpoint(
    config: ConfigDict, network: Network, workdir: Path, train_examples: int, mesh: Mesh
) -> Trained:
    """Returns the checkpoint at config.checkpoint, or the newest intact one of `workdir`.

    Args:
      config: of the run.
      network: of the run.
      workdir: used if config.checkpoint is empty.
      train_examples: examples per epoch.
      mesh: devices.

    Raises:
      UserError: missing, damaged, or of another network.
    """
    directory, step = locate(bucket.path_of(config.checkpoint) if config.checkpoint else workdir)
    with Checkpoints(directory, create=False) as checkpoints:

        def restore(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
            facts = checkpoints.read_facts(step)
            if facts["model"] != network.label:
                raise OtherNetworkError(
                    f"{directory}/{step} is a checkpoint of {facts['model']}, expected "
                    f"{network.label}; set config.model or config.checkpoint accordingly"
                )
            return facts, checkpoints.restore_items(step, abstract_variables(network), mesh)

        if step is None:
            step, (facts, variables), _ = checkpoints.newest_good(restore)
        else:
            facts, variables = restore(step)
    name = f"{directory}/{step}"
    policy = policy_of_checkpoint(facts["policy"], network.costs, name)
    schedule = setup.make_schedule(config, train_examples)
    stop = schedule[-1].stop
    phase = phase_at(min(step, stop - 1), schedule).phase
    return Trained(name, step, phase, step == stop, policy, variables)


def load_weights(
    path: str | Path, network: Network, mesh: Mesh, rules: Sequence[str] = ()
) -> tuple[dict[str, Any], int | None]:
    """Returns trained params and batch_stats, and the checkpoint's step (None for weight files).

    Args:
      path: a weight file, a workdir (its newest checkpoint), or one checkpoint.
      network: the network they are for.
      mesh: devices.
      rules: config.pretrained_names, for a weight file.

    Raises:
      UserError: missing, damaged, or of another network.
    """
    shapes = abstract_variables(network)
    target = {name: shapes[name] for name in ("params", "batch_stats")}
    path = bucket.path_of(path)
    if not path.is_dir():
        if bucket.is_remote(path):
            raise UserError(f"{path}: expected a workdir; copy weight files to this machine first")
        names = registry.architecture_of(network.model).torch_names
        if rules:
            pairs = tuple(tuple(rule.split("=", 1)) for rule in rules)
            names = names._replace(modules=pairs)
        weights, report = torch_weights.load_pretrained(path, target, names)
        logging.info("%s:\n%s", path, torch_weights.format_report(report))
        return weights, None
    directory, step = locate(path)
    with Checkpoints(directory, create=False) as checkpoints:
        step = checkpoints.require_latest_step() if step is None else step
        weights = checkpoints.restore_items(step, target, mesh)
    if broken := nonfinite.broken_leaves(weights):
        raise UserError(
            f"{directory / str(step)}: {nonfinite.listed(broken)} not finite; start from another "
            "checkpoint"
        )
    logging.info("%s: weights of step %d", path, step)
    return weights, step


def load_calibrated(
    config: ConfigDict,
    network: Network,
    dataset: Dataset,
    mesh: Mesh,
    given: dict[str, Any] | None = None,
) -> TrainState:
    """Returns trained weights with all step sizes calibrated, without training.

    The step sizes come from the first training batch.

    Args:
      config: of the run; its `pretrained` names the weights.
      network: the network they are for.
      dataset: to calibrate on.
      mesh: devices.
      given: params and batch_stats, in place of config.pretrained.

    Raises:
      UserError: without weights, and as `load_weights` does.
    """
    if config.pretrained:
        given, _ = load_weights(config.pretrained, network, mesh, config.pretrained_names)
    if given is None:
        raise UserError("config.pretrained='': expected a weight file or a workdir")
    state = sharding.replicate(setup.init_state(config, network, given), mesh)
    passes = calibrations(config, acts=True, weights=True)
    batch = next(iter(setup.train_batches(config, dataset, mesh, 0, 1)))
    return jax.jit(make_calibrate(network.model, passes, config, train=False))(state, batch)


def load_teacher(
    config: ConfigDict, image_shape: tuple[int, int, int]
) -> tuple[nn.Module | None, dict[str, Any]]:
    """Returns the distillation teacher and its variables, (None, {}) without one.

    config.teacher.path is a path for `load_weights`; the teacher runs at full precision.
    """
    if not config.teacher.path:
        return None, {}
    model = registry.make(
        config.teacher.model, config.data.num_classes, QuantSettings(), image_shape,
        source="config.teacher.model",
    )  # fmt: skip
    teacher = Network(model, "", image_shape, costs={}, budget=None, further_budgets={})
    return model, load_weights(config.teacher.path, teacher, sharding.make_mesh())[0]
