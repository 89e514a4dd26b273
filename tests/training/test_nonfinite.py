"""Non-finite values: a run stops at the first or skips a limited number of steps."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamix_jax.data import batching
from metamix_jax.training import nonfinite, setup
from metamix_jax.training.checkpoints import DIRECTORY
from metamix_jax.training.step import gradient_step
from metamix_jax.training.step.batch_step import _skipping, make_train_step
from tests.helpers.inject import poisoned
from tests.helpers.processes import (
    TOTAL,
    assert_one_error_line,
    assert_same_run,
    command,
    rows_of,
)
from tests.helpers.tiny_network import (
    BATCH,
    calibrated_state,
    compiled,
    entered,
    make_batch,
    make_branches,
    make_config,
    span_of,
)


def test_numbers_that_are_not_finite(processes, tmp_path):
    workdir = tmp_path / "run"
    settings = {"full_precision.learning_rate": 1e30, "log_every_steps": 100}
    done = processes.finish(command(f"--workdir={workdir}", **settings, checkpoint_every_steps=1))
    assert done.returncode == 1
    assert_one_error_line(done.stderr, "not finite at step", nonfinite.NAME)
    report = json.loads((workdir / nonfinite.NAME).read_text())
    step = report["step"]
    assert f"not finite at step {step} (full_precision)" in done.stderr
    assert report["phase"] == "full_precision" and report["not_finite"]
    indices, _ = batching.train_indices(1437, seed=0, step=step - 1, batch_size=16)
    assert report["examples"] == indices.tolist()
    assert report["largest"]["params/conv1/kernel"].keys() == {"largest", "not_finite"}
    assert any(row["largest"] > 1e20 or row["not_finite"] for row in report["largest"].values())
    # The newest checkpoint is from the step before, and intact.
    steps = [int(path.name) for path in (workdir / DIRECTORY).iterdir()]
    assert max(steps) == step - 1
    evaluate = command(f"--workdir={workdir}", "--mode=evaluate", **settings)
    assert processes.result(evaluate)["checkpoint_step"] == step - 1


def test_broken_leaves():
    state = {"a": jax.numpy.array([1.0, -3.0]), "b": {"c": jax.numpy.array([np.nan, -2, np.inf])}}
    assert nonfinite.broken_leaves(state) == ["b/c"]
    assert nonfinite.largest_values(state) == {
        "a": {"largest": 3.0, "not_finite": 0}, "b/c": {"largest": 2.0, "not_finite": 2},
    }  # fmt: skip


def injected(arguments, *steps):
    """Returns a command with one NaN in a gradient at some steps, counted from 0."""
    return [sys.executable, "-m", "tests.helpers.inject", ",".join(map(str, steps)), *arguments[2:]]


@pytest.mark.faults
@pytest.mark.parametrize("allowed", [0, 1])
def test_one_number_of_one_gradient(allowed, processes, tmp_path):
    workdir = tmp_path / "run"
    arguments = command(f"--workdir={workdir}", max_skipped_steps=allowed)
    done = processes.finish(injected(arguments, 3, *[1] * allowed))
    assert done.returncode == 1
    assert done.stderr.count("step 2 (full_precision) skipped: gradient_norm") == allowed
    assert_one_error_line(done.stderr, "gradient_norm not finite at step 4 .full_precision")
    report = json.loads((workdir / nonfinite.NAME).read_text())
    assert (report["step"], report["not_finite"]) == (4, ["gradient_norm"])
    assert [path.name for path in (workdir / DIRECTORY).iterdir()] == ["0"]


def test_a_skipped_step_changes_nothing(monkeypatch):
    """In the alternation, where the first update is finite but the second is not."""
    bad = {**make_batch(), "label": np.zeros(BATCH, np.int32)}
    hook = poisoned(gradient_step.pass_gradient, bad["label"][None], "logits")
    monkeypatch.setattr(gradient_step, "pass_gradient", hook)
    config, network = make_config(max_skipped_steps=1), setup.make_network(make_config())
    with jax.numpy_dtype_promotion("standard"):
        state = entered(calibrated_state(config, network, make_batch()), "bit_search", config)
        span, branches = span_of("bit_search"), make_branches(network)
        # The same compiled step with and without skipping.
        plain = compiled(make_train_step(network.model, span, make_config(), network.budget, None))
        train_step = _skipping(plain)

        def after(step, state, batch):
            return step(jax.tree.map(jnp.copy, state), batch, branches, None)

        skipped, numbers = after(train_step, state, bad)
        assert not np.isfinite(numbers["gradient_norm"]) and numbers["skipped_steps"] == 1
        assert np.isfinite(numbers["bit_meta_gradient_norm"])
        assert skipped.step == state.step + 1 and skipped.skipped_steps == 1
        assert_same_arrays(skipped, state)
        # The next step is as if nothing had happened, ...
        good, numbers = after(train_step, skipped, make_batch())
        assert numbers["skipped_steps"] == 1
        # ... and the same as without skipping.
        expected, _ = after(plain, state, make_batch())
        assert_same_arrays(good, expected)
        with pytest.raises(AssertionError):
            assert_same_arrays(good, skipped)


def assert_same_arrays(first, second):
    """Asserts that all variables and optimizer states are bitwise equal; steps may differ."""

    def leaves(state):
        found = jax.tree_util.tree_leaves_with_path((state.variables, state.opt_states))
        return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in found}

    assert leaves(first) == leaves(second)


@pytest.mark.faults
def test_skipped_steps_when_killed(processes, tmp_path):
    """In three phases: a run killed after each ends like an uninterrupted one."""
    steps, settings = (3, 35, 70), {"max_skipped_steps": 3}
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    done = processes.finish(injected(command(f"--workdir={reference}", **settings), *steps))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" skipped: ") == 3
    assert rows_of(reference)[-1]["step"] == TOTAL
    arguments = injected(command(f"--workdir={workdir}", **settings), *steps)
    for step in (6, 37, 72):
        with processes.running(arguments, workdir, step):
            pass
    processes.result(arguments)
    assert_same_run(workdir, reference, **settings)
