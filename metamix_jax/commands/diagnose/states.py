"""The two states compared by a diagnosis: the weights before and after bit-meta."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.runtime import sharding
from metamix_jax.training import setup, start_weights
from metamix_jax.training.calibrate import calibrations, make_calibrate
from metamix_jax.training.checkpoints import Checkpoints, locate
from metamix_jax.training.schedule import Span
from metamix_jax.workdir import bucket


class State(NamedTuple):
    """Variables with step sizes for activations and weights, and their origin."""

    variables: dict[str, Any]
    facts: dict[str, Any]  # source; for a checkpoint also step and phase


def load_states(
    config: ConfigDict,
    workdir: Path,
    network: setup.Network,
    schedule: Sequence[Span],
    batch: Mapping[str, jax.Array],
    mesh: Mesh,
) -> dict[str, State]:
    """Returns the states "before" and "after", or the only one available.

    Args:
      config: "before" comes from diagnose.before, else pretrained; "after" from checkpoint, else
        the workdir.
      workdir: of the run.
      network: the network of the weights.
      schedule: the run's phases.
      batch: for calibrating missing step sizes.
      mesh: devices.

    Raises:
      UserError: neither state exists, or one cannot be read.
    """
    found = {}
    before = config.diagnose.before or config.pretrained
    if before:
        weights, step = start_weights.load_weights(before, network, mesh)
        facts = {"source": before} | ({} if step is None else {"step": step})
        found["before"] = _calibrated(config, network, weights, facts, batch, mesh, True, True)
    after = bucket.path_of(config.checkpoint) if config.checkpoint else workdir
    directory, _ = locate(after)
    if config.checkpoint or directory.is_dir():
        found["after"] = _after(config, after, network, schedule, batch, mesh)
    if not found:
        raise UserError(
            f"config.pretrained='' and no checkpoints in {workdir}: expected trained weights, a "
            "workdir with a run, or both, for --mode=diagnose"
        )
    for name, state in found.items():
        logging.info("%s: %s", name, ", ".join(f"{k} {v}" for k, v in state.facts.items()))
    return found


def _after(
    config: ConfigDict,
    path: Path,
    network: setup.Network,
    schedule: Sequence[Span],
    batch: Mapping[str, jax.Array],
    mesh: Mesh,
) -> State:
    directory, step = locate(path)
    with Checkpoints(directory, create=False) as checkpoints:
        checkpoints.require_latest_step()
        step = newest_of_search(checkpoints.steps, schedule) if step is None else step
        model = checkpoints.read_facts(step)["model"]
        if model != network.label:
            raise UserError(
                f"{directory}/{step}: holds {model}; expected {network.label} as configured; use "
                "the run's configuration or another config.checkpoint"
            )
        variables = checkpoints.restore_items(step, setup.abstract_variables(network), mesh)
    phase = phase_of(step, schedule)
    anew = config.diagnose.recalibrate
    entered = [] if anew else [span.phase for span in schedule if span.start <= step]
    facts = {"source": str(bucket.origin(path)), "step": step, "phase": phase}
    return _calibrated(
        config, network, variables, facts, batch, mesh,
        acts=not any(phase.quantizes for phase in entered),
        weights=not any(phase.quantizes_weights for phase in entered),
    )  # fmt: skip


def newest_of_search(steps: Sequence[int], schedule: Sequence[Span]) -> int:
    """Returns the last of `steps` inside bit-meta or bit-search, or else the last of all."""
    spans = [span for span in schedule if span.phase.quantizes and not span.phase.needs_policy]
    inside = [step for step in steps if any(span.start < step <= span.stop for span in spans)]
    if inside:
        return max(inside)
    logging.info(
        "no checkpoint of the meta-state is kept (steps %s), using the newest one as \"after\"; "
        "diagnose after --mode=search to see the meta-state", ", ".join(map(str, steps)),
    )  # fmt: skip
    return max(steps)


def phase_of(step: int, schedule: Sequence[Span]) -> str:
    """Returns the phase of the last of `step` steps; "start" for step 0."""
    return next((span.phase.name for span in schedule if span.start < step <= span.stop), "start")


def _calibrated(
    config: ConfigDict,
    network: setup.Network,
    variables: Mapping[str, Any],
    facts: dict[str, Any],
    batch: Mapping[str, jax.Array],
    mesh: Mesh,
    acts: bool,
    weights: bool,
) -> State:
    """Returns the state, with step sizes of `acts` and `weights` calibrated on `batch` if true."""
    state = setup.init_state(config, network, variables)
    state = sharding.replicate(state.replace(quant=variables.get("quant", state.quant)), mesh)
    passes = calibrations(config, acts=acts, weights=weights)
    if passes:
        state = jax.jit(make_calibrate(network.model, passes, config, train=False))(state, batch)
    steps = {"act_steps": acts, "weight_steps": weights}
    facts |= {kind: "calibrated" if anew else "as trained" for kind, anew in steps.items()}
    return State(state.variables, facts)
