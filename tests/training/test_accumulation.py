"""Gradient accumulation over micro-batches, against the same by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from metamix_jax.data import batching
from metamix_jax.errors import UserError
from metamix_jax.networks.precision import bit_candidates
from metamix_jax.runtime import sharding
from metamix_jax.training import setup
from metamix_jax.training.step.batch_step import micro_batch
from metamix_jax.training.step.gradient_step import make_update, passes
from metamix_jax.training.step.state import split_by_label
from tests.helpers.tiny_network import (
    BATCH,
    calibrated_state,
    compiled,
    entered,
    make_batch,
    make_branches,
    make_config,
    mesh_of,
    phase_of,
)

pytestmark = pytest.mark.usefixtures("optax_arithmetic")
PARTS = 2


@pytest.fixture(scope="module")
def config():
    # Not Adam, which takes a full step along a gradient that is zero up to rounding.
    return make_config(**{"accumulation_steps": PARTS, "optimizer.name": "sgd"})


@pytest.fixture(scope="module")
def network(config):
    return setup.make_network(config)


@pytest.fixture(scope="module")
def state(config, network):
    return calibrated_state(config, network, make_batch())


def parts_of(config):
    """Returns the micro-batches of one batch, in the form that updates take."""
    batch = make_batch()
    images = batching.preprocess(batch["image"], mean=config.data.mean, std=config.data.std)
    return [(images[part::PARTS], batch["label"][part::PARTS], None) for part in range(PARTS)]


def recorded(monkeypatch, network, config, update, state, parts, branches):
    """Returns the gradient passed to the optimizer, and the new state."""
    recorder = optax.GradientTransformation(
        lambda trained: trained,
        lambda gradient, _, trained: (jax.tree.map(jnp.zeros_like, trained), gradient),
    )
    monkeypatch.setattr(
        "metamix_jax.training.step.gradient_step.make_optimizer", lambda *_: recorder
    )
    apply_update = make_update(network.model, update, 10, config, network.budget)
    state = state.replace(opt_states={update.name: None})
    after, metrics = compiled(apply_update)(state, parts, branches)
    return after.opt_states[update.name], after, metrics


def test_gradient_is_the_mean_of_the_micro_batches(monkeypatch, config, network, state):
    """Statistics are passed from one micro-batch to the next, for the widths in order."""
    (update,), branches = phase_of("bit_meta", config).updates, make_branches(network)
    parts = parts_of(config)
    trained, frozen = split_by_label(state, update.trains)

    @compiled
    def gradient_of(batch_stats, images, labels, precision):
        def loss_of(trained):
            scores, moved = network.model.apply(
                unflatten_dict({**frozen, **trained}, sep="/") | {"batch_stats": batch_stats},
                images, train=True, precision=precision, mutable=["batch_stats"],
            )  # fmt: skip
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
            return losses.mean(), moved["batch_stats"]

        return jax.value_and_grad(loss_of, has_aux=True)(trained)

    candidates = bit_candidates(config.quant.act_bits, config.quant.weight_bits)
    searched = [path for path, cost in network.costs.items() if cost.searched]
    batch_stats, losses, gradients = state.batch_stats, [], []
    for precision in passes(update, candidates, branches, searched):
        for images, labels, _ in parts:
            (loss, batch_stats), gradient = gradient_of(batch_stats, images, labels, precision)
            losses.append(loss)
            gradients.append(gradient)
    found, after, metrics = recorded(monkeypatch, network, config, update, state, parts, branches)
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-6)
    for path in found:
        mean = np.mean([gradient[path] for gradient in gradients], axis=0)
        if path.endswith("act_step"):  # LSQ's scale counts the elements of the whole batch
            mean = mean / np.sqrt(PARTS)
        np.testing.assert_allclose(found[path], mean, rtol=1e-4, atol=1e-6, err_msg=path)
    statistics = flatten_dict(batch_stats, sep="/")
    for path, value in flatten_dict(after.batch_stats, sep="/").items():
        np.testing.assert_allclose(value, statistics[path], rtol=1e-5, atol=1e-7, err_msg=path)


def test_micro_batches_alike_are_one_batch(config, network, state):
    """All of them the same images, so that batch norm makes no difference: the whole batch's step.

    Uses the update with all features: two gradients, a budget, weights, steps and logits.
    """
    half, found = parts_of(config)[0], []
    (update,) = phase_of("sharpness_search", config).updates
    whole = tuple(None if rows is None else np.concatenate([rows] * PARTS) for rows in half)
    for parts in ([whole], [half] * PARTS):
        settings = make_config(**{"optimizer.name": "sgd", "accumulation_steps": len(parts)})
        before = entered(state, "sharpness_search", settings)
        apply_update = make_update(network.model, update, 10, settings, network.budget)
        found.append(compiled(apply_update)(before, parts, {}))
    (one, numbers_of_one), (several, numbers) = found
    for name, value in numbers_of_one.items():
        assert float(numbers[name]) == pytest.approx(float(value), rel=1e-5), name
    gap = float(one.surrogate_gap)
    assert float(several.surrogate_gap) == pytest.approx(gap, rel=1e-3) and gap > 0
    assert one.params["conv1"]["kernel"].tolist() != state.params["conv1"]["kernel"].tolist()
    expected = split_by_label(one, update.trains)[0]
    for path, value in split_by_label(several, update.trains)[0].items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_micro_batches_need_no_communication():
    rows = sharding.shard_batch({"rows": np.arange(BATCH)}, mesh_of(2))["rows"]
    function = jax.jit(micro_batch, static_argnums=2).lower(rows, np.int32(1), PARTS).compile()
    text = function.as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    assert np.asarray(function(rows, np.int32(1))).tolist() == list(range(1, BATCH, PARTS))


def test_batches_that_do_not_split():
    with pytest.raises(UserError, match="batch_size=12: expected a multiple of 2 .devices. x 4 "
                       ".config.accumulation_steps."):  # fmt: skip
        sharding.check_batch_size(12, mesh_of(2), 4)
    sharding.check_batch_size(16, mesh_of(2), 4)
    with pytest.raises(UserError, match="config.accumulation_steps=0: expected more than 0"):
        setup.make_network(make_config(accumulation_steps=0))
