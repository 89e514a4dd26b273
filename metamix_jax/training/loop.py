"""The whole pipeline: one loop over the steps of all phases, resumable at any step."""

import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.config import may_change
from metamix_jax.data import datasets
from metamix_jax.runtime import distributed, failures
from metamix_jax.runtime.interruption import Interruption
from metamix_jax.runtime.progress import Progress
from metamix_jax.training.checkpoints import DIRECTORY, KEPT, Checkpoints
from metamix_jax.training.given import Given
from metamix_jax.training.run import Run
from metamix_jax.training.schedule import phase_at
from metamix_jax.training.step.batch_step import make_train_step
from metamix_jax.training.step.state import TrainState
from metamix_jax.workdir import bucket
from metamix_jax.workdir.claim import claim_workdir
from metamix_jax.workdir.metrics import MetricWriter

__all__ = ["TrainState", "make_train_step", "train_and_evaluate"]


def train_and_evaluate(
    config: ConfigDict,
    workdir: Path,
    *,
    stop_after_search: bool = False,
    given: Given | None = None,
) -> dict[str, Any]:
    """Runs all phases of `config` in `workdir`, resuming from its newest checkpoint.

    Args:
      config: a configuration of `configs/`.
      workdir: where all files are written.
      stop_after_search: stop once the policy is written.
      given: network, weights and data that a Python program hands over.

    Returns:
      The RESULT line's content.

    Raises:
      UserError: anything the user can fix, before compilation.
      RunError: non-finite values, a full disk, out of memory.
      InterruptedRunError: SIGTERM or SIGINT, after saving.
    """
    given = given or Given()
    config = given.named(config)
    with (
        Interruption(config.signal_grace_seconds) as interruption,
        failures.explained(workdir, config),
        distributed.files_of(workdir) as files,
    ):
        run = Run.prepare(config, files, given)
        facts = datasets.fingerprint(run.dataset)
        with claim_workdir(config, files, facts, may_change(), run.sources):
            return _train(run, workdir, interruption, stop_after_search)


def _train(
    run: Run, workdir: Path, interruption: Interruption, stop_after_search: bool
) -> dict[str, Any]:
    config, schedule = run.config, run.schedule
    if stop_after_search:
        schedule = [span for span in schedule if not span.phase.needs_policy]
    total = schedule[-1].stop if schedule else 0
    home = bucket.origin(workdir)
    with Checkpoints(home / DIRECTORY, create=True) as checkpoints:
        latest, state = run.resume(checkpoints) or (None, run.init_state())
        step = latest or 0
        if not bucket.is_remote(home):
            failures.require_room(workdir, state, saves=KEPT + 1 - len(checkpoints.steps))
        if latest is not None and latest >= total:
            logging.info("%s: already finished, nothing to do", home)
            return run.finish(stop_after_search)
        if latest is not None:
            logging.info("resuming from step %d in %s", step, phase_at(step, schedule).phase.name)
        with (
            MetricWriter(run.workdir, resume_step=-1 if latest is None else latest) as writer,
            Progress(total, step, config.batch_size, "setting up") as progress,
        ):
            run.writer, run.progress = writer, progress
            if latest is None:
                state = run.begin(state, run.schedule[0])
                bucket.push(run.workdir)
                run.save(checkpoints, step, run.schedule[0].phase, state)
            for span in schedule:
                if step >= span.stop:
                    continue
                train_step = run.make_step(state, span, step)
                progress.description, metrics = span.phase.name, None
                interruption.stop_if_requested(step)
                lengths = run.feed.block_lengths(step, span.stop)
                for steps, batch in run.feed.blocks(step, lengths):
                    with run.clock(span.phase.name):
                        before = metrics
                        state, metrics = train_step(state, batch)
                        # At most one block ahead of the device, so that the rate shown is correct.
                        run.guard.check_metrics(step, span.phase.name, before, state)
                        step += steps
                        progress.update(step, **{k: metrics[k] for k in metrics if "loss" in k})
                        if step % config.log_every_steps == 0 or step == span.stop:
                            run.log(step, span.phase, metrics, state)
                    ends, stops = step == span.stop, interruption.requested_at(step)
                    saves = ends or stops or step % config.checkpoint_every_steps == 0
                    if saves:
                        run.guard.check_metrics(step, span.phase.name, metrics, state)
                    if ends or (config.eval.every_steps and step % config.eval.every_steps == 0):
                        run.evaluate(step, state, span.phase)
                    if ends and step < run.schedule[-1].stop:
                        state = run.begin(state, phase_at(step, run.schedule))
                    elif ends:
                        state = run.settle_statistics(state, span.phase)
                    if saves:
                        # Before the checkpoint, because resuming from it needs these files.
                        bucket.push(run.workdir)
                        run.save(checkpoints, step, span.phase, state)
                    if stops:
                        interruption.stop_if_requested(step)
    return run.finish(stop_after_search)
