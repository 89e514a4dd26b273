"""Trained weights to start from or to learn from: weight files and other runs' checkpoints."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from metamix_jax import models, pretrained, sharding
from metamix_jax.checkpoints import Checkpoints, locate
from metamix_jax.experiment import Network, abstract_variables
from metamix_jax.precision import QuantSettings


def load_weights(
    path: str | Path, variables: Mapping[str, Any], mesh: Mesh
) -> tuple[dict[str, Any], int | None]:
    """Returns trained params and batch_stats, and the step of the checkpoint they come from.

    Args:
      path: a weight file, or a workdir (its newest checkpoint), or one checkpoint.
      variables: shapes.
      mesh: devices.

    Raises:
      UserError: not there, damaged, or of another network.
    """
    target = {name: variables[name] for name in ("params", "batch_stats")}
    if not Path(path).is_dir():
        weights, report = pretrained.load_pretrained(path, target)
        logging.info("%s:\n%s", path, pretrained.format_report(report))
        return weights, None
    directory, step = locate(Path(path))
    with Checkpoints(directory, create=False) as checkpoints:
        step = checkpoints.require_latest_step() if step is None else step
        weights = checkpoints.restore_items(step, target, mesh)
    logging.info("%s: weights of step %d", path, step)
    return weights, step


def load_teacher(
    config: ConfigDict, image_shape: tuple[int, int, int]
) -> tuple[nn.Module | None, dict[str, Any]]:
    """Returns the distillation teacher and its variables, (None, {}) without one.

    config.teacher.path is as `load_weights` takes it; the teacher runs at full precision.
    """
    if not config.teacher.path:
        return None, {}
    model = models.make(
        config.teacher.model, config.data.num_classes, QuantSettings(), "config.teacher.model"
    )
    teacher = Network(model, "", image_shape, costs={}, budget=None, further_budgets={})
    shapes = abstract_variables(teacher)
    return model, load_weights(config.teacher.path, shapes, sharding.make_mesh())[0]
