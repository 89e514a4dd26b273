"""The training step in each phase, recomputed by hand; calibration, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from metamix_jax.data import batching
from metamix_jax.networks.precision import FULL, Precision
from metamix_jax.networks.quantizers import init_step
from metamix_jax.runtime import sharding
from metamix_jax.training import setup
from metamix_jax.training.calibrate import calibrations, make_calibrate
from metamix_jax.training.step import batch_step as train_step
from metamix_jax.training.step import gradient_step as update_module
from metamix_jax.training.step.batch_step import make_train_step
from metamix_jax.training.step.gradient_step import make_update, task_loss
from metamix_jax.training.step.state import enter_phase, split_by_label
from tests.helpers.float32 import sum_error
from tests.helpers.tiny_network import (
    BATCH,
    BITS,
    ROWS,
    STEPS,
    calibrated_state,
    compiled,
    entered,
    fresh_state,
    leaves,
    make_batch,
    make_branches,
    make_config,
    mesh_of,
    moved_labels,
    phase_of,
    softmax,
    span_of,
)

pytestmark = pytest.mark.usefixtures("optax_arithmetic")


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def network(config):
    return setup.make_network(config)


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@pytest.fixture(scope="module")
def images(config, batch):
    return batching.preprocess(batch["image"], mean=config.data.mean, std=config.data.std)


@pytest.fixture(scope="module")
def branches(network):
    return make_branches(network)


@pytest.fixture(scope="module")
def fresh(config, network):
    return fresh_state(config, network)


@pytest.fixture(scope="module")
def state(config, network, batch):
    return calibrated_state(config, network, batch)


def recorded_gradient(monkeypatch, network, config, update, state, images, labels, branches):
    """Returns the gradient that `make_update` passes to its optimizer, and the new state."""
    recorder = optax.GradientTransformation(
        lambda trained: trained,
        lambda gradient, _, trained: (jax.tree.map(jnp.zeros_like, trained), gradient),
    )
    with monkeypatch.context() as patch:
        patch.setattr(update_module, "make_optimizer", lambda *_: recorder)
        apply_update = make_update(network.model, update, STEPS, config, network.budget)
    state = state.replace(opt_states={update.name: None})
    after, metrics = compiled(apply_update)(state, [(images, labels, None)], branches)
    return after.opt_states[update.name], after, metrics


def distance(actual, expected):
    """Returns the norm of the difference of two flat dicts, relative to `expected`."""
    assert actual.keys() == expected.keys()
    difference = {path: actual[path] - expected[path] for path in expected}
    return float(optax.tree.norm(difference) / optax.tree.norm(expected))


# Separately compiled programs round sums differently, by 1e-7, so an activation close to a rounding
# boundary can be quantized to another level. Hence norms are compared, to 1 %.
def test_bit_meta_gradient_is_the_mean_of_one_pass_per_width(
    monkeypatch, config, network, state, images, batch, branches
):
    (update,) = phase_of("bit_meta", config).updates
    trained, frozen = split_by_label(state, update.trains)

    def loss_of(trained, batch_stats, branch):
        tree = traverse_util.unflatten_dict({**frozen, **trained}, sep="/")
        scores, moved = network.model.apply(
            {**tree, "batch_stats": batch_stats},
            images,
            train=True,
            precision=Precision(activations=branch),
            mutable=["batch_stats"],
        )
        log_shares = scores - jax.scipy.special.logsumexp(scores, axis=-1, keepdims=True)
        return -jnp.mean(log_shares[jnp.arange(BATCH), batch["label"]]), moved["batch_stats"]

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    run_branch = {
        branch: compiled(lambda batch_stats, k=branch: gradient_of(trained, batch_stats, k))
        for branch in (0, 1)
    }

    batch_stats, losses, gradients = state.batch_stats, [], []
    for branch in (1, 0):  # 2 bits before 8; each pass updates the statistics of the last
        (loss, batch_stats), gradient = run_branch[branch](batch_stats)
        losses.append(loss)
        gradients.append(gradient)
    mean = {path: (gradients[0][path] + gradients[1][path]) / 2 for path in trained}

    arguments = (update, state, images, batch["label"], branches)
    found, after, metrics = recorded_gradient(monkeypatch, network, config, *arguments)
    assert distance(found, mean) < 1e-2
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert metrics["gradient_norm"] == pytest.approx(float(optax.tree.norm(mean)), rel=1e-2)
    statistics = traverse_util.flatten_dict(batch_stats, sep="/")
    assert distance(traverse_util.flatten_dict(after.batch_stats, sep="/"), statistics) < 1e-4

    last = make_config(**{"bit_meta.loss": "last"})
    arguments = (*phase_of("bit_meta", last).updates, *arguments[1:])
    found, after, metrics = recorded_gradient(monkeypatch, network, last, *arguments)
    assert distance(found, gradients[-1]) < 1e-2
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    # The alternatives differ by more than the tolerances.
    assert distance(gradients[-1], mean) > 0.1
    (_, once), _ = run_branch[0](state.batch_stats)
    (_, swapped), _ = run_branch[1](once)
    assert distance(traverse_util.flatten_dict(swapped, sep="/"), statistics) > 1e-3


@pytest.fixture(scope="module")
def apply_updates(network):
    """Update name -> the compiled update, with a bit-meta rate large enough to matter."""
    config = make_config(**{"bit_meta.learning_rate": 1e-2})
    return {
        update.name: compiled(make_update(network.model, update, STEPS, config, network.budget))
        for update in phase_of("bit_search", config).updates
    }


@pytest.mark.parametrize("commit", [False, True])
def test_bit_search_moves_logits_only(
    commit, apply_updates, network, state, images, batch, branches
):
    config = make_config(**{"bit_search.commit_batch_stats": commit})
    before = entered(state, "bit_search", config)
    if commit:
        update = phase_of("bit_search", config).updates[-1]
        apply_update = compiled(make_update(network.model, update, STEPS, config, network.budget))
    else:
        apply_update = apply_updates["bit_search"]
    after, metrics = apply_update(before, [(images, batch["label"], None)], branches)
    assert moved_labels(before, after) == ({"logits", "batch_stats"} if commit else {"logits"})
    assert metrics["cost"] > 0
    gap = abs(float(metrics["cost"]) - network.budget.limit) / network.budget.cost_model.reference
    expected = config.bit_search.budget_weight * gap
    assert metrics["budget_term"] == pytest.approx(expected, rel=1e-5)


def test_unfixed_search_moves_weights_and_steps_too(network, state, images, batch, branches):
    config = make_config(**{"bit_search.fixed_meta_state": False, "bit_search.alternate": False})
    span = next(
        span
        for span in setup.make_schedule(config, 10 * config.batch_size)
        if span.phase.name == "bit_search"
    )
    before = enter_phase(state, span, config)
    (update,) = span.phase.updates
    apply_update = compiled(make_update(network.model, update, STEPS, config, network.budget))
    after, _ = apply_update(before, [(images, batch["label"], None)], branches)
    assert moved_labels(before, after) == {"kernels", "weights", "act_steps", "logits"}


def test_frozen_weights_cost_no_gradient(network, state, images, batch, branches):
    def convolutions(update, phase):
        config = make_config()
        apply_update = make_update(network.model, update, STEPS, config, network.budget)
        parts = [(images, batch["label"], None)]
        before = entered(state, phase, config)
        traced = jax.jit(apply_update).trace(before, parts, branches)
        # The CPU form relies on XLA to drop unused gradients.
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
        return program.count("stablehlo.convolution")

    layers = sum(leaf.ndim == 4 for leaf in jax.tree.leaves(state.params))
    # Each layer runs, and is differentiated for its input (except the image) and its kernel.
    (full_precision,) = phase_of("full_precision").updates
    assert convolutions(full_precision, "full_precision") == 3 * layers - 1
    assert convolutions(phase_of("bit_search").updates[1], "bit_search") == 2 * layers - 1


def test_bit_search_sees_the_weights_after_bit_metas_step(
    apply_updates, network, state, images, batch, branches
):
    config = make_config(**{"data.augment": "none", "bit_meta.learning_rate": 1e-2})
    before = entered(state, "bit_search", config)
    step = make_train_step(
        network.model, span_of("bit_search", config), config, network.budget, None
    )
    after, metrics = compiled(step)(before, batch, branches, {})

    arguments = ([(images, batch["label"], None)], branches)
    between, meta_metrics = apply_updates["bit_meta"](before, *arguments)
    assert moved_labels(before, between) == {"kernels", "weights", "act_steps", "batch_stats"}
    by_hand, search_metrics = apply_updates["bit_search"](between, *arguments)
    assert moved_labels(between, by_hand) == {"logits"}
    assert (after.step, by_hand.step) == (1, 0)

    assert metrics["bit_meta_loss"] == pytest.approx(float(meta_metrics["loss"]), rel=1e-4)
    assert metrics["loss"] == pytest.approx(float(search_metrics["loss"]), rel=2e-3)
    # At the weights before the bit-meta step, the loss would be quite different.
    _, too_early = apply_updates["bit_search"](before, *arguments)
    assert metrics["loss"] != pytest.approx(float(too_early["loss"]), rel=2e-2)


# Losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cross_entropy", "distillation", "both"])
def test_task_loss(kind):
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(5, 10), scale=3).astype(np.float32)
    labels = generator.integers(0, 10, 5, np.int32)
    soft_targets = softmax(generator.normal(size=(5, 10)).astype(np.float32))
    log_shares = np.log(softmax(scores.astype(np.float64)))
    parts = {
        "cross_entropy": -np.mean(log_shares[np.arange(5), labels]),
        "distillation": -np.mean(np.sum(soft_targets * log_shares, axis=-1)),
    }
    expected = parts["cross_entropy"] + parts["distillation"] if kind == "both" else parts[kind]
    found = task_loss(jnp.asarray(scores), labels, jnp.asarray(soft_targets), kind)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_distillation_learns_from_the_teacher_in_evaluation_mode(
    network, state, images, batch, branches
):
    config = make_config(**{"loss": "distillation", "data.augment": "none"})
    # Weights different from the student's. Step sizes are not used at full precision.
    louder = jax.tree.map(lambda leaf: 1.5 * leaf + 0.1, state.params)
    teacher = state.variables | {"params": louder}
    step = make_train_step(
        network.model, span_of("full_precision", config), config, None, network.model
    )
    before = entered(state, "full_precision", config)
    after, metrics = compiled(step)(before, batch, branches, teacher)

    @compiled
    def scores_of_both():
        scores, _ = network.model.apply(
            state.variables, images, train=True, mutable=["batch_stats"], precision=FULL
        )
        return network.model.apply(teacher, images, train=False), scores

    soft, scores = (np.float64(scores) for scores in scores_of_both())
    shares, log_shares = softmax(soft), np.log(softmax(scores))
    expected = -np.mean(np.sum(shares * log_shares, axis=-1))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert "kernels" in moved_labels(before, after)


# Calibration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lowest", [False, True])
def test_calibration_passes(lowest):
    config = make_config(**{"quant.init_pass": "lowest_bits" if lowest else "full_precision"})
    acts = Precision("calibrate_lowest" if lowest else "calibrate")
    weights = Precision(weights="calibrate")
    expected = {(0, 0): (), (1, 0): (acts,), (0, 1): (weights,), (1, 1): (acts, weights)}
    for (has_acts, has_weights), passes in expected.items():
        found = calibrations(config, acts=bool(has_acts), weights=bool(has_weights))
        assert found == passes


def test_calibration_takes_act_steps_from_what_the_layers_get(config, network, fresh, batch):
    images = train_step.training_images(batch, config)  # augmented, as in training
    passes = calibrations(config, acts=True, weights=False)
    calibrate = make_calibrate(network.model, passes, config, train=True)
    state = compiled(calibrate)(fresh, batch)
    assert moved_labels(fresh, state) == {"act_steps"}

    stem = init_step(images, 8, signed=True)
    # Means of the same numbers, summed in different orders.
    rtol = sum_error(images.size)
    np.testing.assert_allclose(state.quant["conv1"]["act_step"], [stem], rtol=rtol)

    # The next layer gets the stem's output, normalized with the batch's own statistics.
    y = jax.lax.conv_general_dilated(
        images, fresh.params["conv1"]["kernel"], (1, 1), ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    y = np.float64(y)
    y = np.maximum((y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5), 0)
    expected = [2 * np.mean(y) / np.sqrt(2**bits - 1) for bits in BITS]
    np.testing.assert_allclose(state.quant["layer1_0"]["conv1"]["act_step"], expected, rtol=1e-4)


def test_weight_calibration_fills_weight_steps_only(config, network, state, batch):
    before = state.replace(
        quant=jax.tree.map_with_path(
            lambda path, leaf: jnp.ones_like(leaf) if path[-1].key == "weight_step" else leaf,
            state.quant,
        )
    )
    passes = calibrations(config, acts=False, weights=True)
    calibrate = make_calibrate(network.model, passes, config, train=True)
    after = compiled(calibrate)(before, batch)
    assert moved_labels(before, after) == {"weight_steps"}

    kernel = np.float64(state.params["layer1_0"]["conv2"]["kernel"])
    expected = 2 * np.mean(np.abs(kernel), axis=(0, 1, 2)) / np.sqrt(7)  # 4 bits: 7 levels per side
    found = after.quant["layer1_0"]["conv2"]["weight_step"]
    np.testing.assert_allclose(found, expected[None], rtol=1e-6)


# Devices ---------------------------------------------------------------------------------------


def run_three_steps(name, devices, config, network, state, branches):
    """Returns the state and the metrics after each of three steps."""
    mesh = mesh_of(devices)
    generator = np.random.default_rng(3)
    state = sharding.replicate(entered(state, name, config), mesh)
    step, states, rows = None, [], []
    for number in range(3):
        batch = sharding.shard_batch(make_batch(generator, number), mesh)
        arguments = (state, batch, branches, {})
        if step is None:
            # Compiled once, as in a run: if a step returned other shapes, types or placements, the
            # next call would be an error instead of a second compilation.
            function = make_train_step(
                network.model, span_of(name, config), config, network.budget, None
            )
            step = compiled(function).lower(*arguments).compile()
        state, metrics = step(*arguments)
        states.append(state)
        rows.append({key: float(value) for key, value in metrics.items()})
    return states, rows


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("bit_meta", "bit_search", "weight_training")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in ROWS
    ],
)  # fmt: skip
def test_one_and_two_devices_agree_with_one_compilation(name, network, state, branches):
    # Not Adam, which takes a full step along a gradient that is zero up to rounding.
    config = make_config(**{"optimizer.name": "sgd"})
    states_of_one, rows_of_one = run_three_steps(name, 1, config, network, state, branches)
    states_of_two, rows_of_two = run_three_steps(name, 2, config, network, state, branches)
    one, two = states_of_one[-1], states_of_two[-1]
    assert two.params["conv1"]["kernel"].sharding.num_devices == 2
    assert int(one.step) == int(two.step) == 3
    moving = set().union({"batch_stats"}, *(update.trains for update in phase_of(name).updates))
    assert moved_labels(state, one) == moved_labels(state, two) == moving

    # Sums over the batch are rounded differently on two devices, by 1e-7, until this moves a value
    # across a rounding boundary. With quantized weights, which are few and have a large effect,
    # this happens in the second step, so there only the first is compared.
    steps, tolerance = (1, 1e-3) if name == "weight_training" else (3, 1e-5)
    for number in range(steps):
        assert rows_of_one[number].keys() == rows_of_two[number].keys()
        for key in ("loss", "bit_meta_loss") if name == "bit_search" else ("loss",):
            wanted = pytest.approx(rows_of_two[number][key], rel=1e-5)
            assert rows_of_one[number][key] == wanted, (number, key)
        flat_of_one, flat_of_two = leaves(states_of_one[number]), leaves(states_of_two[number])
        change = {
            path: np.linalg.norm(flat_of_one[path] - flat_of_two[path])
            / max(np.linalg.norm(flat_of_one[path]), 1e-1)
            for path in flat_of_one
        }
        assert max(change.values()) < tolerance, (number, change)
