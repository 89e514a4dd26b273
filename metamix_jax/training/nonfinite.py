"""Non-finite values: a run stops at the first or skips a limited number of steps; never saved."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metamix_jax.errors import RunError
from metamix_jax.workdir import digests
from metamix_jax.workdir.files import write_json

NAME = "nonfinite.json"


def broken_metrics(metrics: Mapping[str, jax.Array] | None) -> list[str]:
    """Returns the names of the non-finite metrics; blocks on the step that computes them."""
    numbers = jax.device_get(dict(metrics or {}))
    return [name for name, value in numbers.items() if not math.isfinite(value)]


def broken_leaves(state: Any) -> list[str]:
    """Returns the paths of a state's arrays that contain non-finite values."""
    return [path for path, row in largest_values(state).items() if row["not_finite"]]


def largest_values(state: Any) -> dict[str, dict[str, Any]]:
    """Returns path -> {"largest": largest finite |value|, "not_finite": number of non-finite}."""
    leaves = digests.host_leaves(state)
    return {path: _summary(leaf) for path, leaf in leaves.items() if leaf.dtype.kind == "f"}


def _summary(leaf: np.ndarray) -> dict[str, Any]:
    finite = np.isfinite(leaf)
    largest = np.abs(leaf).max(initial=0.0, where=finite)
    return {"largest": float(largest), "not_finite": int(np.sum(~finite))}


def log_skipped(step: int, phase: str, names: list[str], count: int) -> None:
    """Logs that a step was skipped, the run's `count`-th; `names` are the non-finite metrics."""
    text = "step %d (%s) skipped: %s not finite; %d skipped so far (see config.max_skipped_steps)"
    logging.warning(text, step, phase, ", ".join(names), count)


def stop(
    workdir: Path, *, step: int, phase: str, names: list[str], examples: np.ndarray, state: Any
) -> None:
    """Writes nonfinite.json and ends the run.

    Args:
      workdir: where to write it.
      step: the step, counted from 1, with non-finite values.
      phase: its phase.
      names: the non-finite metrics or arrays.
      examples: indices of its batch in the training split [batch].
      state: the state when this was detected.

    Raises:
      RunError: always.
    """
    report = {
        "step": step,
        "phase": phase,
        "not_finite": names,
        "examples": examples.tolist(),
        "largest": largest_values(state),
    }
    write_json(workdir / NAME, report)
    raise RunError(
        f"{', '.join(names[:3])} not finite at step {step} ({phase}); {workdir} keeps the last "
        f"checkpoint before it, and {NAME} the batch's examples and the largest value of each "
        "array; in another --workdir, lower the phase's learning rate or set "
        "config.optimizer.clip_norm or config.max_skipped_steps"
    )
