"""Exchanges against all policies of a small network, and the loss that they go by."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from metamix_jax.networks.precision import Precision
from metamix_jax.selection import cost
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost_models import BUDGET_UNITS
from metamix_jax.selection.policy_loss import policy_loss
from metamix_jax.selection.searchers import metamix, metamix_plus
from metamix_jax.training import setup
from metamix_jax.training.step.batch_step import training_images
from tests.helpers.hand_made_costs import PAIR_COSTS
from tests.helpers.tiny_network import calibrated_state, make_batch, make_config

PICKS = [dict(zip("ab", picks, strict=True)) for picks in itertools.product(range(9), repeat=2)]
MODEL = BUDGET_UNITS["fraction"].model(PAIR_COSTS)


def admitted(budget):
    return [pick for pick in PICKS if budget.admits(cost.bits_at(PAIR_COSTS, pick))]


@pytest.mark.parametrize("seed", range(6))
def test_a_loss_that_is_a_sum_is_minimized(seed):
    generator = np.random.default_rng(seed)
    table = {path: generator.normal(size=9) for path in "ab"}
    budget = Budget(MODEL, generator.uniform(MODEL.least, MODEL.most))
    inside = admitted(budget)

    def loss(choice):
        return sum(table[path][k] for path, k in choice.items())

    start = inside[len(inside) // 2]
    least = metamix_plus.LEAST_SPENT * MODEL.cost_of(start)
    found = metamix_plus.improved(start, loss, PAIR_COSTS, budget, rounds=1)
    assert found == min((pick for pick in inside if MODEL.cost_of(pick) >= least), key=loss)


@pytest.mark.parametrize("seed", range(6))
def test_any_loss_falls_or_stays_and_the_budget_is_kept(seed):
    generator = np.random.default_rng(seed)
    table = generator.normal(size=(9, 9))  # the layers' losses have nothing to do with each other
    sizes = BUDGET_UNITS["mebibytes"].model(PAIR_COSTS)
    budget = Budget(MODEL, MODEL.most * 0.6, (Budget(sizes, sizes.most * 0.8),))
    inside, calls = admitted(budget), []

    def loss(choice):
        calls.append(choice)
        return float(table[choice["a"], choice["b"]])

    start = inside[generator.integers(len(inside))]
    found = metamix_plus.improved(start, loss, PAIR_COSTS, budget, rounds=20)
    assert found in inside and loss(found) <= loss(start)
    least = metamix_plus.LEAST_SPENT * MODEL.cost_of(start)
    assert MODEL.cost_of(found) >= least  # bits are exchanged, not dropped
    # No layer alone can make it better.
    alone = [
        pick for pick in inside
        if (pick["a"] == found["a"]) != (pick["b"] == found["b"]) and MODEL.cost_of(pick) >= least
    ]  # fmt: skip
    assert all(loss(found) <= loss(pick) for pick in alone)
    calls.clear()
    metamix_plus.improved(found, loss, PAIR_COSTS, budget, rounds=20)
    assert len(calls) <= 1 + 16 + metamix_plus.TRIES  # one round, and it stops


def test_nothing_changes_where_nothing_differs():
    budget = Budget(MODEL, MODEL.most)
    assert metamix_plus.improved(PICKS[3], lambda choice: 1.0, PAIR_COSTS, budget, 5) == PICKS[3]


@pytest.fixture(scope="module")
def trained():
    config = make_config(**{"quant.act_bits": (8, 4, 2), "search.searcher": "metamix_plus"})
    network = setup.make_network(config)
    batches = [make_batch(seed) for seed in range(2)]
    state = calibrated_state(config, network, batches[0])
    images = [(training_images(batch, config), batch["label"]) for batch in batches]
    logits = {
        path: np.zeros(3, np.float32) for path, layer in network.costs.items() if layer.searched
    }
    # Weights' steps are those of a network whose weights were not quantized yet.
    flat = flatten_dict(state.quant, sep="/")
    flat = {path: 1 + 0 * leaf if "weight_step" in path else leaf for path, leaf in flat.items()}
    variables = dict(state.variables) | {"quant": unflatten_dict(flat, sep="/")}
    return SearchContext(
        network.model, network.costs, network.budget, config, variables, logits,
        lambda count: iter(images[:count]),
    )  # fmt: skip


def test_the_loss_is_the_networks_at_its_bits(trained):
    context, before = trained, jax.tree.map(np.array, dict(trained.variables))
    loss = policy_loss(context, 2, weight_steps=False)
    choices = [dict.fromkeys(context.logits, branch) for branch in range(3)]
    choices.append({path: i % 3 for i, path in enumerate(context.logits)})
    _, moved = context.model.apply(
        context.variables, next(iter(context.batches(1)))[0], mutable=["quant"],
        precision=Precision(weights="calibrate"),
    )  # fmt: skip
    for choice in choices:
        branches = {path: jnp.int32(branch) for path, branch in choice.items()}
        expected = []
        for images, labels in context.batches(2):
            scores, _ = context.model.apply(
                dict(context.variables) | moved, images, train=True, mutable=["batch_stats"],
                precision=Precision("chosen", "quantized", branches),
            )  # fmt: skip
            expected.append(optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean())
        assert loss(choice) == pytest.approx(float(np.mean(expected)), rel=1e-4)
    assert loss(choices[0]) != loss(choices[2])
    jax.tree.map(np.testing.assert_array_equal, dict(context.variables), before)


def test_the_policy_is_no_worse_than_that_of_the_logits(trained):
    context = trained
    context.config.search.exchange_batches = 2
    found = metamix_plus.choose(context)
    assert context.budget.admits(found)
    loss = policy_loss(context, 2, weight_steps=False)
    start = metamix.choose(context, least_spent=metamix_plus.LEAST_SPENT)

    def of(bits):
        return loss({p: context.costs[p].candidates.index(bits[p]) for p in context.logits})

    assert of(found) <= of(start)
    context.config.search.exchange_rounds = 0
    assert metamix_plus.choose(context) == start
    context.config.search.exchange_rounds = 8


def test_steps_that_the_search_trained_are_kept():
    fields = {"quant.act_bits": (4,), "quant.weight_bits": (8, 4), "budget.value": 1.5}
    config, batch = make_config(**fields), make_batch()
    network = setup.make_network(config)
    state = calibrated_state(config, network, batch)
    images = [(training_images(batch, config), batch["label"])]
    choice = {path: 0 for path, layer in network.costs.items() if layer.searched}
    flat, losses = flatten_dict(state.quant, sep="/"), []
    for factor in (1, 3):
        steps = {path: leaf * factor for path, leaf in flat.items() if "weight_step" in path}
        variables = dict(state.variables) | {"quant": unflatten_dict(flat | steps, sep="/")}
        context = SearchContext(
            network.model, network.costs, network.budget, config, variables, {},
            lambda count: iter(images),
        )  # fmt: skip
        losses.append(policy_loss(context, 1, weight_steps=True)(choice))
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)
