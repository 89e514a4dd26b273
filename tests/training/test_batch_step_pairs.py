"""The training step in a search over pairs of activation and weight bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from metamix_jax.data import batching
from metamix_jax.networks.precision import Bits, Precision
from metamix_jax.networks.quantizers import init_step
from metamix_jax.training import setup
from metamix_jax.training.calibrate import calibrations, make_calibrate
from metamix_jax.training.step.gradient_step import make_update
from metamix_jax.training.step.state import enter_phase, split_by_label
from tests.helpers.tiny_network import (
    BATCH,
    STEPS,
    calibrated_state,
    compiled,
    fresh_state,
    leaves,
    make_batch,
    make_config,
    moved_labels,
)

pytestmark = pytest.mark.usefixtures("optax_arithmetic")
PAIRS = (Bits(8, 4), Bits(8, 2), Bits(2, 4), Bits(2, 2))
NARROW_FIRST = (3, 2, 1, 0)
# SGD, so that the gradient can be read from the change of the parameters.
PLAIN = {
    "quant.weight_bits": (4, 2),
    "optimizer.name": "sgd",
    "optimizer.b1": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 1e9,
    "bit_meta.learning_rate": 0.125,
}


@pytest.fixture(scope="module")
def config():
    return make_config(**PLAIN)


@pytest.fixture(scope="module")
def network(config):
    return setup.make_network(config)


@pytest.fixture(scope="module")
def span(config):
    """The span of bit search, with the bit-meta update and its own."""
    schedule = setup.make_schedule(config, STEPS * BATCH)
    return next(span for span in schedule if span.phase.name == "bit_search")


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@pytest.fixture(scope="module")
def images(config, batch):
    return batching.preprocess(batch["image"], mean=config.data.mean, std=config.data.std)


@pytest.fixture(scope="module")
def state(config, network, batch, span):
    return enter_phase(calibrated_state(config, network, batch), span, config)


def stepped(name, config, network, span, state, images, batch):
    """Returns the state and the metrics after one step of an update."""
    (update,) = [update for update in span.phase.updates if update.name == name]
    apply_update = compiled(make_update(network.model, update, STEPS, config, network.budget))
    return apply_update(state, [(images, batch["label"], None)], {})


@pytest.fixture(scope="module")
def after_bit_meta(config, network, span, state, images, batch):
    return stepped("bit_meta", config, network, span, state, images, batch)


def test_bit_meta_moves_all_but_the_logits(state, after_bit_meta, network):
    after, _ = after_bit_meta
    moving = {"kernels", "weights", "act_steps", "weight_steps", "batch_stats"}
    assert moved_labels(state, after) == moving
    # Every width of every searched layer was trained, and so were the fixed layers.
    old, new = leaves(state), leaves(after)
    for path, cost in network.costs.items():
        widths = {"act_step": cost.act_bits, "weight_step": cost.weight_bits}
        for name, bits in widths.items():
            rows = f"quant/{path}/{name}"
            moved = (old[rows] != new[rows]).reshape(len(bits), -1)
            assert moved.any(axis=1).all(), rows
        if cost.searched:
            logits = f"quant/{path}/logits"
            assert cost.candidates == PAIRS
            assert old[logits].shape == (len(PAIRS),)
            assert old[logits].tobytes() == new[logits].tobytes()


# Separately compiled programs round sums differently, see test_batch_step.py; hence norms.
def test_bit_meta_gradient_is_the_mean_of_one_pass_per_pair(
    config, network, span, state, images, batch, after_bit_meta
):
    trained, frozen = split_by_label(state, span.phase.updates[0].trains)
    searched = [path for path, cost in network.costs.items() if cost.searched]

    def loss_of(trained, batch_stats, branch):
        tree = traverse_util.unflatten_dict({**frozen, **trained}, sep="/")
        branches = dict.fromkeys(searched, branch)
        scores, moved = network.model.apply(
            {**tree, "batch_stats": batch_stats},
            images,
            train=True,
            precision=Precision("chosen", "quantized", branches),
            mutable=["batch_stats"],
        )
        log_shares = scores - jax.scipy.special.logsumexp(scores, axis=-1, keepdims=True)
        return -jnp.mean(log_shares[jnp.arange(BATCH), batch["label"]]), moved["batch_stats"]

    run_branch = compiled(jax.value_and_grad(loss_of, has_aux=True))
    batch_stats, losses, gradients = state.batch_stats, [], []
    for branch in NARROW_FIRST:  # each pass updates the statistics of the last
        (loss, batch_stats), gradient = run_branch(trained, batch_stats, jnp.int32(branch))
        losses.append(float(loss))
        gradients.append({path: np.asarray(leaf) for path, leaf in gradient.items()})
    mean = {path: sum(gradient[path] for gradient in gradients) / len(PAIRS) for path in trained}

    after, metrics = after_bit_meta
    moved, _ = split_by_label(after, span.phase.updates[0].trains)
    rate = config.bit_meta.learning_rate
    found = {path: np.asarray((trained[path] - moved[path]) / rate) for path in trained}
    assert distance(found, mean) < 1e-2
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert metrics["gradient_norm"] == pytest.approx(float(optax.tree.norm(mean)), rel=1e-2)
    statistics = traverse_util.flatten_dict(batch_stats, sep="/")
    assert distance(traverse_util.flatten_dict(after.batch_stats, sep="/"), statistics) < 1e-4
    # The types of gradients differ greatly in size.
    for name in ("act_step", "weight_step", "kernel"):
        part = [path for path in mean if path.endswith(name)]
        assert distance({p: found[p] for p in part}, {p: mean[p] for p in part}) < 1e-2, name
    # The alternatives differ by more than the tolerances.
    assert min(distance(gradient, mean) for gradient in gradients) > 0.1
    assert min(np.abs(np.diff(losses))) > 1e-3
    batch_stats = state.batch_stats
    for branch in NARROW_FIRST[::-1]:
        (_, batch_stats), _ = run_branch(trained, batch_stats, jnp.int32(branch))
    assert distance(traverse_util.flatten_dict(batch_stats, sep="/"), statistics) > 1e-3


def distance(actual, expected):
    """Returns the norm of the difference of two flat dicts, relative to `expected`."""
    assert actual.keys() == expected.keys()
    difference = {path: actual[path] - expected[path] for path in expected}
    return float(optax.tree.norm(difference) / optax.tree.norm(expected))


def test_bit_search_moves_logits_only(config, network, span, state, images, batch):
    after, metrics = stepped("bit_search", config, network, span, state, images, batch)
    assert moved_labels(state, after) == {"logits"}
    old, new = leaves(state), leaves(after)
    searched = [path for path, cost in network.costs.items() if cost.searched]
    bits = {path: cost.candidates[0] for path, cost in network.costs.items()}
    for path in searched:
        logits = f"quant/{path}/logits"
        assert (old[logits] != new[logits]).all()
        bits[path] = PAIRS[int(np.argmax(old[logits]))]
    # The cost is that of the most probable pairs.
    assert len({bits[path] for path in searched}) > 1
    spent = network.budget.cost(bits)
    assert metrics["cost"] == pytest.approx(spent, rel=1e-5)
    gap = abs(spent - network.budget.limit) / network.budget.cost_model.reference
    expected = config.bit_search.budget_weight * gap
    assert metrics["budget_term"] == pytest.approx(expected, rel=1e-4)


def test_calibration_fills_the_steps_of_all_weight_widths(config, network):
    fresh = fresh_state(config, network)
    passes = calibrations(config, acts=False, weights=True)
    calibrate = make_calibrate(network.model, passes, config, train=True)
    after = compiled(calibrate)(fresh, make_batch())
    assert moved_labels(fresh, after) == {"weight_steps"}
    for layer, widths in (("conv1", (4, 2)), ("conv2", (4, 2))):
        kernel = fresh.params["layer2_0"][layer]["kernel"]
        expected = [init_step(kernel, b, signed=True, per_channel=True) for b in widths]
        found = after.quant["layer2_0"][layer]["weight_step"]
        np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-6)
    (stem,) = after.quant["conv1"]["weight_step"]
    by_hand = 2 * np.abs(np.float64(fresh.params["conv1"]["kernel"])).mean((0, 1, 2)) / 127**0.5
    np.testing.assert_allclose(stem, by_hand, rtol=1e-5)
