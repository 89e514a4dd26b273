"""Non-finite values: a run stops at the first or skips a limited number of steps; never saved."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from metamix_jax.data import batching
from metamix_jax.errors import RunError
from metamix_jax.workdir import digests
from metamix_jax.workdir.files import write_json

NAME = "nonfinite.json"


def metrics_by_step(metrics: Mapping[str, jax.Array] | None) -> list[dict[str, float]]:
    """Returns the metrics, scalars or [steps], of each step; blocks on the steps' computation."""
    numbers = {
        name: np.ravel(values) for name, values in jax.device_get(dict(metrics or {})).items()
    }
    rows = zip(*numbers.values(), strict=True)
    return [dict(zip(numbers, map(float, row), strict=True)) for row in rows]


def broken_leaves(state: Any) -> list[str]:
    """Returns the paths of a state's arrays that contain non-finite values."""
    return [path for path, row in largest_values(state).items() if row["not_finite"]]


def largest_values(state: Any) -> dict[str, dict[str, Any]]:
    """Returns path -> {"largest": largest finite |value|, "not_finite": number of non-finite}."""
    leaves = digests.host_leaves(state)
    return {path: _summary(leaf) for path, leaf in leaves.items() if leaf.dtype.kind == "f"}


def listed(names: list[str], most: int = 3) -> str:
    """Returns the first names in words: "a, b, c and 4 more are"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more} {'is' if len(names) == 1 else 'are'}"


def _summary(leaf: np.ndarray) -> dict[str, Any]:
    finite = np.isfinite(leaf)
    largest = np.abs(leaf).max(initial=0.0, where=finite)
    return {"largest": float(largest), "not_finite": int(np.sum(~finite))}


class FiniteGuard:
    """Ends a run at the first non-finite values, but for steps that may be skipped.

    skipped: steps skipped so far; they have changed nothing (batch_step.py).
    """

    def __init__(self, workdir: Path, config: ConfigDict, train_examples: int):
        self.skipped = 0
        self._workdir, self._config, self._train_examples = workdir, config, train_examples

    def check_metrics(
        self, step: int, phase: str, metrics: Mapping[str, jax.Array] | None, state: Any
    ) -> None:
        """Waits for the steps that compute `metrics` and ends the run where one is not finite.

        Up to config.max_skipped_steps skipped steps are logged instead.

        Args:
          step: number of the last of these steps, counted from 1.
          phase: its phase.
          metrics: scalars of one step, or [steps].
          state: the newest state, for the report.

        Raises:
          RunError: nonfinite.json has the details.
        """
        rows = metrics_by_step(metrics)
        for number, row in enumerate(rows, start=step + 1 - len(rows)):
            self._check_step(number, phase, row, state)

    def _check_step(self, step: int, phase: str, metrics: dict[str, float], state: Any) -> None:
        names = [name for name, value in metrics.items() if not math.isfinite(value)]
        if "skipped_steps" in metrics:
            known, self.skipped = self.skipped, int(metrics["skipped_steps"])
            names = (names or ["the updated state"]) if self.skipped > known else []
            if names and self.skipped <= self._config.max_skipped_steps:
                logging.warning(
                    "step %d (%s) skipped: %s not finite; %d skipped so far (see "
                    "config.max_skipped_steps)", step, phase, ", ".join(names), self.skipped,
                )  # fmt: skip
                return
        if names:
            self._stop(step, phase, names, state)

    def check_state(self, step: int, phase: str, state: Any) -> None:
        """Ends the run where an array of a state that is about to be saved is not finite.

        Raises:
          RunError: nonfinite.json has the details.
        """
        if names := broken_leaves(state):
            self._stop(step, phase, names, state)

    def _stop(self, step: int, phase: str, names: list[str], state: Any) -> None:
        examples, _ = batching.train_indices(
            self._train_examples,
            seed=self._config.seed,
            step=max(step - 1, 0),
            batch_size=self._config.batch_size,
        )
        report = {
            "step": step,  # counted from 1
            "phase": phase,
            "not_finite": names,
            "examples": examples.tolist(),  # of its batch, indices in the training split
            "largest": largest_values(state),
        }
        write_json(self._workdir / NAME, report)
        raise RunError(
            f"{', '.join(names[:3])} not finite at step {step} ({phase}); {self._workdir} keeps "
            f"the last checkpoint before it, and {NAME} the batch's examples and the largest value "
            "of each array; in another --workdir, lower the phase's learning rate or set "
            "config.optimizer.clip_norm or config.max_skipped_steps"
        )
