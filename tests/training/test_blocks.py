"""Blocks of steps in one compiled program: the same steps, the same order, the same end."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metamix_jax.data.splits import MemorySplit
from metamix_jax.errors import RunError
from metamix_jax.runtime import sharding
from metamix_jax.training import setup
from metamix_jax.training.feed import Feed
from metamix_jax.training.nonfinite import FiniteGuard
from metamix_jax.training.step import blocks
from metamix_jax.training.step.batch_step import make_train_step
from tests.helpers.processes import TOTAL, assert_same_run, command, rows_of
from tests.helpers.tiny_network import (
    BITS,
    calibrated_state,
    compiled,
    entered,
    leaves,
    make_batch,
    make_branches,
    make_config,
    mesh_of,
    span_of,
)

STEPS = 2


@given(
    st.integers(0, 60),
    st.integers(0, 60),
    st.integers(1, 12),
    st.lists(st.integers(1, 25), min_size=1, max_size=3),
)
def test_blocks_cover_every_step_and_end_at_every_interval(start, count, steps, every):
    lengths = list(blocks.block_lengths(start, start + count, steps, every))
    ends = list(itertools.accumulate(lengths, initial=start))
    assert ends[-1] == start + count
    assert set(lengths) <= {1, steps}
    for interval in every:
        stops = {step for step in range(start + 1, start + count + 1) if step % interval == 0}
        assert stops <= set(ends)


def memory_split(images=50):
    shape = (images, 8, 8, 1)
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 10, images, np.int32)
    return MemorySplit(generator.integers(0, 256, shape, np.uint8), labels)


@pytest.mark.parametrize(
    ("backend", "limit", "logs", "evaluations", "expected"),
    [
        ("cpu", 2**30, 20, 0, 0),
        ("gpu", 2**30, 20, 0, 10),
        ("tpu", 2**30, 24, 0, 12),
        ("gpu", 2**30, 20, 30, 10),
        ("gpu", 2**30, 20, 35, 5),
        ("gpu", 2**30, 7, 0, 1),
        ("gpu", 1000, 20, 0, 1),
    ],
)
def test_automatic_length(monkeypatch, backend, limit, logs, evaluations, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(blocks, "MOST_RESIDENT_BYTES", limit)
    every = {"log_every_steps": logs, "eval.every_steps": evaluations}
    config = make_config(**every, checkpoint_every_steps=200 if logs != 24 else 240)
    assert blocks.block_steps(config, memory_split()) == expected
    assert blocks.block_steps(make_config(steps_per_dispatch=3), memory_split()) == 3


@pytest.fixture(scope="module")
def network():
    return setup.make_network(make_config())


CASES = [
    ("bit_search", {}),
    ("bit_meta", {"bit_meta.loss": "last", "accumulation_steps": 2}),
    ("weight_training", {"max_skipped_steps": 1}),
]


@pytest.mark.usefixtures("optax_arithmetic")
@pytest.mark.parametrize(("phase", "overrides"), CASES)
def test_a_block_is_its_steps_one_by_one(phase, overrides, network):
    # Not Adam, which takes a full step along a gradient that is zero up to rounding.
    config = make_config(**{"optimizer.name": "sgd"}, **overrides)
    state = entered(calibrated_state(config, network, make_batch()), phase, config)
    state = state.replace(skipped_steps=jnp.int32(0) if config.max_skipped_steps else None)
    branches, generator = make_branches(network), np.random.default_rng(3)
    batches = [make_batch(generator, number) for number in range(STEPS)]
    step, scanned = (
        make_train_step(
            network.model, span_of(phase, config), config, network.budget, None, scan=scan
        )
        for scan in (False, True)
    )
    one, rows = jax.tree.map(jnp.copy, state), []
    step = compiled(step)
    for batch in batches:
        one, metrics = step(one, batch, branches, {})
        rows.append(metrics)
    # The images come from the split on the device, by index.
    resident = {key: np.concatenate([b[key] for b in batches]) for key in ("image", "label")}
    block = {key: np.stack([b[key] for b in batches]) for key in ("index", "epoch")}
    run = compiled(blocks.in_blocks(scanned))
    whole, metrics = run(state, block, resident, branches, {})
    assert int(whole.step) == int(one.step) == STEPS
    # Rounding differs until it moves a value across a rounding boundary, which with quantized
    # weights happens in the second step: see test_batch_step.py.
    steps, tolerance = (1, None) if phase == "weight_training" else (STEPS, 1e-5)
    for name, values in metrics.items():
        assert values.shape == (STEPS,)
        wanted = [float(row[name]) for row in rows[:steps]]
        if "accuracy" not in name:
            assert values[:steps].tolist() == pytest.approx(wanted, rel=1e-4), name
    if tolerance:
        found, wanted = leaves(whole), leaves(one)
        for path in wanted:
            size = max(np.linalg.norm(wanted[path]), 1e-1)
            assert np.linalg.norm(found[path] - wanted[path]) / size < tolerance, path


META_UPDATE = ["zeros", *["add_part"] * len(BITS), "descend"]
OTHER_UPDATE = ["zeros", "add_part", "descend"]


@pytest.mark.parametrize(
    ("phase", "updates"),
    [
        ("bit_search", META_UPDATE + OTHER_UPDATE),
        ("bit_meta", META_UPDATE),
        ("weight_training", OTHER_UPDATE),
    ],
)
def test_a_block_launches_one_program_and_a_single_step_several(phase, updates, network):
    config = make_config()
    state = entered(calibrated_state(config, network, make_batch()), phase, config)
    step, scanned = (
        make_train_step(
            network.model, span_of(phase, config), config, network.budget, None, scan=scan
        )
        for scan in (False, True)
    )
    batch, branches = make_batch(), make_branches(network)
    assert launched(step, state, batch, branches, {}) == ["prepare", *updates, "count"]
    block = {key: np.stack([rows] * STEPS) for key, rows in batch.items()}
    assert launched(blocks.in_blocks(scanned), state, block, {}, branches, {}) == ["run"]


def launched(function, *arguments):
    """Returns the programs of one call by name: the equations outside any compiled function."""
    equations = jax.make_jaxpr(function)(*arguments).eqns
    return [eqn.params.get("name", eqn.primitive.name) for eqn in equations]


@pytest.mark.parametrize("resident", [False, True])
def test_feed_reads_the_same_steps_in_blocks(monkeypatch, resident):
    monkeypatch.setattr(blocks, "MOST_RESIDENT_BYTES", 2**30 if resident else 0)
    config = make_config(steps_per_dispatch=4, log_every_steps=6, checkpoint_every_steps=6)
    dataset = setup.load_dataset(config, sharding.make_mesh())
    feed = Feed(config, dataset, mesh_of(2))
    assert bool(feed.resident) == resident
    wanted, lengths = list(feed.batches(3, 14)), feed.block_lengths(3, 14)
    assert lengths == (1, 1, 1, 4, 1, 1, 1, 1)
    step = 0
    for length, block in feed.blocks(3, lengths):
        assert ("image" in block) != resident
        for row in range(length):
            batch = {name: rows[row] for name, rows in block.items()}
            if resident:
                batch |= {key: whole[batch["index"]] for key, whole in feed.resident.items()}
            assert batch.keys() == wanted[step].keys()
            for key, value in batch.items():
                np.testing.assert_array_equal(value, wanted[step][key])
            step += 1
    assert step == len(wanted)


def test_the_first_bad_step_of_a_block_is_named(tmp_path):
    guard = FiniteGuard(tmp_path, make_config(), train_examples=50)
    good = {"loss": jnp.float32([1, 2, 3])}
    guard.check_metrics(9, "bit_meta", good, state={})
    bad = {"loss": jnp.float32([1, np.inf, np.nan])}
    with pytest.raises(RunError, match="loss not finite at step 8 .bit_meta."):
        guard.check_metrics(9, "bit_meta", bad, state={})


def test_skipped_steps_of_a_block_are_counted(tmp_path, caplog):
    guard = FiniteGuard(tmp_path, make_config(max_skipped_steps=2), train_examples=50)
    metrics = {"loss": jnp.float32([1, np.nan, 3]), "skipped_steps": jnp.int32([0, 1, 1])}
    guard.check_metrics(3, "bit_meta", metrics, state={})
    assert guard.skipped == 1
    assert "step 2 (bit_meta) skipped: loss not finite" in caplog.text


@pytest.mark.faults
def test_a_run_in_blocks_killed_and_resumed_is_the_same_run(processes, tmp_path):
    settings = {"steps_per_dispatch": 4, "search.searcher": "none", "full_precision.epochs": 1}
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    processes.result(command(f"--workdir={reference}", **settings))
    arguments = command(f"--workdir={workdir}", **settings)
    with processes.running(arguments, workdir, 6):
        pass  # killed on leaving
    processes.result(arguments)
    assert rows_of(reference)[-1]["step"] < TOTAL
    assert_same_run(workdir, reference, **settings)
