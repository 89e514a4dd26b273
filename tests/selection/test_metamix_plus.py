"""The better of two policies, and the loss that tells."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from metamix_jax.networks.precision import Precision
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.policy_loss import policy_loss
from metamix_jax.selection.searchers import hessian, metamix, metamix_plus
from metamix_jax.training import setup
from metamix_jax.training.step.batch_step import training_images
from tests.helpers.tiny_network import calibrated_state, make_batch, make_config


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


def test_the_better_of_two_policies_is_chosen(trained):
    context = trained
    context.config.search.loss_batches = 2
    loss = policy_loss(context, 2, weight_steps=False)

    def of(bits):
        return loss({p: context.costs[p].candidates.index(bits[p]) for p in context.logits})

    sensitive = hessian.choose(context)
    # From logits at random: some policies are better than that of the Hessian, others worse.
    contexts = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        logits = {path: generator.normal(size=3).astype(np.float32) for path in context.logits}
        contexts.append(dataclasses.replace(context, logits=logits))
    policies = [metamix.choose(own, least_spent=metamix_plus.LEAST_SPENT) for own in contexts]
    losses = [of(bits) for bits in policies]
    assert min(losses) < of(sensitive) < max(losses)
    best, worst = np.argmin(losses), np.argmax(losses)
    assert metamix_plus.choose(contexts[best]) == policies[best]
    assert metamix_plus.choose(contexts[worst]) == sensitive


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
