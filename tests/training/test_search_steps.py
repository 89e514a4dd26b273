"""Steps of searches: several budgets at once, joint and sharpness-aware training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from metamix_jax.data import batching
from metamix_jax.networks.precision import Precision
from metamix_jax.selection.budget import make_budget
from metamix_jax.training.setup import make_network
from metamix_jax.training.step.batch_step import make_train_step
from metamix_jax.training.step.gradient_step import make_update
from metamix_jax.training.step.state import (
    enter_phase,
    further_searches,
    split_by_label,
    swap_search,
    with_logits,
)
from tests.helpers.tiny_network import (
    BATCH,
    STEPS,
    calibrated_state,
    compiled,
    leaves,
    make_batch,
    make_config,
    moved_labels,
    phase_of,
    span_of,
)

OTHERS = (0.7, 1.6)


@pytest.fixture(scope="module")
def network():
    return make_network(make_config())


@pytest.fixture(scope="module")
def state(network):
    return calibrated_state(make_config(), network, make_batch())


def search_logits(state):
    return {path: np.asarray(row) for path, row in split_by_label(state, {"logits"})[0].items()}


def copied(state):
    """Returns a state that a training step may consume."""
    return jax.tree.map(jnp.copy, state)


def searched(network, state, config, budgets):
    """Returns the state after two steps of bit search with `budgets`, the first as the main one."""
    first, *others = (make_budget(network.costs, value, "fraction") for value in budgets)
    further = dict(zip(further_searches(config), others, strict=True))
    span = span_of("bit_search", config)
    state = enter_phase(copied(state), span, config)
    step = make_train_step(network.model, span, config, first, None, further)
    for number in range(2):
        state, metrics = step(state, make_batch(number, number), {}, {})
    return state, metrics


def test_budgets_searched_at_once_end_bitwise_as_each_alone(network, state):
    rate = {"bit_search.learning_rate": 0.05}
    together, metrics = searched(
        network, state, make_config(**rate, **{"search.budgets": OTHERS}), (0.9, *OTHERS)
    )
    keys = [f"budget_{value:g}" for value in OTHERS]
    for value, key in ((0.9, None), *zip(OTHERS, keys, strict=True)):
        alone, own = searched(network, state, make_config(**rate), (value,))
        state_there = (
            together if key is None else with_logits(together, together.searches[key].logits)
        )
        expected, found = search_logits(alone), search_logits(state_there)
        assert {path: row.tobytes() for path, row in found.items()} == {
            path: row.tobytes() for path, row in expected.items()
        }
        assert metrics["cost" if key is None else f"cost_{key}"] == own["cost"]
        assert moved_labels(alone, together) <= {"logits"}  # one meta-state for all
    distinct = {
        np.concatenate(list(together.searches[key].logits.values())).tobytes() for key in keys
    }
    assert len(distinct) == len(keys)
    assert "temperature" not in metrics  # with its default, nothing is divided


@pytest.mark.parametrize("start", [0, 7])
def test_the_temperature_falls_geometrically_over_the_phase(network, state, start):
    config = make_config(**{"bit_search.last_temperature": 0.25})
    span = dataclasses.replace(span_of("bit_search", config), start=start, stop=start + STEPS)
    before = enter_phase(copied(state), span, config).replace(step=jnp.int32(start))
    step = make_train_step(network.model, span, config, network.budget, None)
    for number in range(3):
        before, metrics = step(before, make_batch(number, number), {}, {})
        assert metrics["temperature"] == pytest.approx(0.25 ** (number / STEPS), rel=1e-6)


def test_swapping_a_search_twice_changes_nothing(network, state):
    config = make_config(**{"search.budgets": OTHERS})
    span = span_of("bit_search", config)
    entered = enter_phase(state, span, config)
    update = span.phase.updates[-1]
    there_and_back = swap_search(swap_search(entered, "budget_0.7", update), "budget_0.7", update)
    assert jax.tree.structure(there_and_back) == jax.tree.structure(entered)
    assert moved_labels(entered, there_and_back) == set()


def entered(state, name, config):
    span = span_of(name, config)
    return enter_phase(copied(state), span, config), span


def far_apart(one, other):
    """Returns the norm of the difference of two trees, relative to the second."""
    difference = jax.tree.map(lambda a, b: a - b, one, other)
    return float(optax.tree.norm(difference) / optax.tree.norm(other))


@pytest.mark.parametrize("name", ["joint_search", "sharpness_search"])
def test_searches_without_a_meta_state_train_all_but_weight_steps(network, state, name):
    config = make_config()
    before, span = entered(state, name, config)
    step = make_train_step(network.model, span, config, network.budget, None)
    after, metrics = step(copied(before), make_batch(), {}, {})
    moved = {"kernels", "weights", "act_steps", "logits", "batch_stats"}
    assert moved_labels(before, after) == moved
    assert {"loss", "cost", "budget_term"} <= set(metrics)


def test_sharpness_aware_gradient_is_the_mean_of_two_at_different_weights(
    monkeypatch, network, state
):
    config = make_config()
    (update,) = phase_of("sharpness_search", config).updates
    radius, alignment = config.asga.start_radius, config.asga.alignment
    batch = make_batch()
    images = batching.preprocess(batch["image"], mean=config.data.mean, std=config.data.std)
    trained, frozen = split_by_label(state, update.trains)
    labels = jnp.asarray(batch["label"])

    def loss_of(trained):
        variables = unflatten_dict({**frozen, **trained}, sep="/")
        scores, moved = network.model.apply(
            {**variables, "batch_stats": state.batch_stats}, images, train=True,
            precision=Precision("mixture"), mutable=["batch_stats"],
        )  # fmt: skip
        loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()
        return loss, moved["batch_stats"]

    # The budget term does not depend on weights, so it is left out here and below.
    config.bit_search.budget_weight = 0.0
    gradient_of = compiled(jax.value_and_grad(loss_of, has_aux=True))
    (loss, statistics), first = gradient_of(trained)
    weights = {path: leaf for path, leaf in first.items() if path.startswith("params/")}
    factor = radius / float(optax.tree.norm(weights)) - alignment
    perturbed = trained | {path: trained[path] + factor * g for path, g in weights.items()}
    (greatest, others), second = gradient_of(perturbed)
    expected = {path: (first[path] + second[path]) / 2 for path in first}

    recorder = optax.GradientTransformation(
        lambda trained: trained,
        lambda gradient, _, trained: (jax.tree.map(jnp.zeros_like, trained), gradient),
    )
    monkeypatch.setattr(
        "metamix_jax.training.step.gradient_step.make_optimizer", lambda *_: recorder
    )
    apply_update = make_update(network.model, update, STEPS, config, network.budget)
    before = copied(state).replace(
        opt_states={update.name: None}, surrogate_gap=jnp.expm1(jnp.float32(radius))
    )
    after, metrics = compiled(apply_update)(before, [(images, labels, None)], {})
    found = after.opt_states[update.name]
    difference = optax.tree.norm({path: found[path] - expected[path] for path in expected})
    assert float(difference / optax.tree.norm(expected)) < 0.01  # rounding, see test_batch_step
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    gap = max(float(greatest - loss), 0.0)
    assert gap > 0
    assert float(after.surrogate_gap) == pytest.approx(gap, rel=0.05)
    # The running statistics are those of the first pass.
    assert far_apart(after.batch_stats, statistics) < 1e-4 < far_apart(others, statistics)
    # The weights are unchanged: the perturbation is undone.
    assert {p: a.tobytes() for p, a in leaves(after).items() if p.startswith("params")} == {
        p: a.tobytes() for p, a in leaves(state).items() if p.startswith("params")
    }
    assert len(images) == BATCH


def test_layout_of_checkpoints(network, state):
    """That of version 0.1, whose runs can be continued."""
    config = make_config(**{"search.budgets": OTHERS, "max_skipped_steps": 1})
    state = enter_phase(state, span_of("bit_search", config), config)
    tree = state.to_tree()
    assert tree.keys() == {"params", "batch_stats", "quant", "training"}
    assert tree["training"].keys() == {"opt_states", "step", "rng"}
    updates, keys = {"bit_meta", "bit_search"}, set(further_searches(config))
    assert tree["training"]["opt_states"].keys() == updates | keys | {"skipped_steps"}
    assert all(
        tree["training"]["opt_states"][key].keys() == {"logits", "optimizer"} for key in keys
    )
    again = state.from_tree(tree)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert moved_labels(state, again) == set()
    sharp = make_config()
    state = enter_phase(state, span_of("sharpness_search", sharp), sharp)
    assert state.to_tree()["training"]["opt_states"].keys() == {
        "sharpness_search", "surrogate_gap", "skipped_steps",
    }  # fmt: skip
    assert state.from_tree(state.to_tree()).surrogate_gap == state.surrogate_gap
