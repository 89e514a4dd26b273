"""OMPQ against NumPy and all policies; test_ompq_sizes.py covers size budgets."""

import copy
import dataclasses
import itertools
import logging
import time

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from metamix_jax.networks import registry
from metamix_jax.selection import cost
from metamix_jax.selection.budget import make_budget
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.searchers import ompq
from metamix_jax.training import setup
from metamix_jax.training.step import batch_step as train_step
from tests.helpers.tiny_network import fresh_state, make_batch, make_config

WIDTHS = (8, 6, 4, 2)


def make_context(**overrides):
    config = make_config(**overrides)
    network = setup.make_network(config)
    state = fresh_state(config, network)

    def batches(count):
        for number in range(count):
            batch = make_batch(number)
            yield train_step.training_images(batch, config), batch["label"]

    return SearchContext(
        network.model, network.costs, network.budget, config, state.variables, {}, batches
    )


@pytest.fixture(scope="module")
def context():
    return make_context(**{"quant.act_bits": (8, 4, 2)})


@pytest.fixture(scope="module")
def grams(context):
    return ompq.gram_matrices(context)


@pytest.fixture(scope="module")
def weights_context():
    """Only weights are searched, with a size budget."""
    return make_context(
        **{"quant.act_bits": (4,), "quant.weight_bits": WIDTHS},
        **{"budget.unit": "mebibytes", "budget.value": 0.0035},
    )


def with_budget(context, value, unit):
    budget = make_budget(context.costs, value, unit)
    return dataclasses.replace(context, budget=budget)


def with_field(context, path, value):
    config = copy.deepcopy(context.config)
    config.update_from_flattened_dict({path: value})
    return dataclasses.replace(context, config=config)


def features(seed, count=4, images=6):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(images, size)) for size in rng.integers(2, 9, count)]


def centred_gram(x):
    centre = np.eye(len(x)) - 1 / len(x)
    return centre @ x @ x.T @ centre


def cka(rows):
    return ompq.linear_cka({str(k): centred_gram(x) for k, x in enumerate(rows)})


@pytest.mark.parametrize("seed", range(3))
def test_cka_against_its_formula_in_feature_space(seed):
    rows = features(seed)
    centred = [x - x.mean(0) for x in rows]
    expected = [
        [
            np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
            for y in centred
        ]
        for x in centred
    ]
    found = cka(rows)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(np.diag(found), 1, rtol=1e-12)
    np.testing.assert_allclose(found, found.T, rtol=1e-12)
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-12


def test_cka_is_blind_to_rotations_scales_and_offsets():
    rows = features(0)
    rng = np.random.default_rng(1)
    turned = [
        3.7 * (k + 1) * x @ np.linalg.qr(rng.normal(size=(x.shape[1], x.shape[1])))[0] + 5 * k
        for k, x in enumerate(rows)
    ]
    np.testing.assert_allclose(cka(turned), cka(rows), rtol=1e-9)
    # Not invariant to any linear map.
    assert np.abs(cka([x * np.arange(1, x.shape[1] + 1) for x in rows]) - cka(rows)).max() > 0.01


def test_cka_of_unrelated_and_of_constant_outputs():
    first, second = np.eye(4)[:2].T, np.eye(4)[2:].T
    first, second = first - first.mean(0), second - second.mean(0)
    similarity = cka([first, 2 * first, np.ones((4, 3))])
    np.testing.assert_allclose(similarity, [[1, 1, 0], [1, 1, 0], [0, 0, 0]], atol=1e-12)


def test_grams_are_of_the_searched_layers_outputs_in_training_mode(context, grams):
    images, _ = next(context.batches(1))
    variables = {name: context.variables[name] for name in ("params", "batch_stats")}
    _, found = context.model.apply(
        variables, images, train=True, capture_intermediates=True,
        mutable=["intermediates", "batch_stats"],
    )  # fmt: skip
    flat = flatten_dict(found["intermediates"], sep="/")
    assert list(grams) == list(context.budget.cost_model.branch_costs)
    for path, gram in grams.items():
        output = np.asarray(flat[f"{path}/__call__"][0], float)
        expected = centred_gram(output.reshape(len(output), -1))
        np.testing.assert_allclose(gram, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_importances_by_hand():
    similarity = np.array([[1, 0.5, 0.25], [0.5, 1, 0], [0.25, 0, 1]])
    gamma = np.array([0.75, 0.5, 0.25])
    for beta in (0.0, 3.3, 10.0):
        theta = ompq.importances(similarity, beta)
        np.testing.assert_allclose(theta, np.exp(-beta * gamma) / np.exp(-beta * 0.25), rtol=1e-12)
    # exp(-100 * 30) is 0 in floating point; the ratios are not.
    # What a layer has in common with itself does not count.
    np.testing.assert_array_equal(ompq.importances(np.array([[5.0, 1.0], [1.0, 2.0]]), 3.0), 1.0)
    theta = ompq.importances(np.ones((31, 31)), 100.0)
    np.testing.assert_array_equal(theta, 1)


def test_suffix_means_by_hand():
    np.testing.assert_allclose(ompq.suffix_means(np.array([3.0, 1, 5, 7])), [4, 13 / 3, 6, 7])


def exhaustive(values, costs, room):
    """Returns the greatest total value of a choice within the budget."""
    best = -np.inf
    for picks in itertools.product(*(range(len(row)) for row in values.values())):
        chosen = list(zip(values, picks, strict=True))
        if sum(costs[path][k] for path, k in chosen) <= room * (1 + 1e-9):
            best = max(best, sum(values[path][k] for path, k in chosen))
    return best


@pytest.mark.parametrize(
    ("searched", "value", "unit"),
    [("act", 0.9, "fraction"), ("act", 4.5, "average_act_bits"), ("weight", 1.1, "fraction")],
)
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_policy_is_the_best_inside_the_budget(
    beta, searched, value, unit, context, weights_context, grams, monkeypatch
):
    context = with_budget(context if searched == "act" else weights_context, value, unit)
    budget, costs = context.budget, context.costs
    monkeypatch.setattr(ompq, "gram_matrices", lambda context: grams)
    bits = ompq.choose(with_field(context, "ompq.beta", beta))
    assert list(bits) == list(costs)
    assert budget.cost(bits) <= budget.limit * (1 + 1e-9)
    theta = np.exp(-beta * (ompq.linear_cka(grams).sum(1) - 1))
    values = {
        path: [theta[k:].mean() * getattr(pair, searched) / 8 for pair in costs[path].candidates]
        for k, path in enumerate(budget.cost_model.branch_costs)
    }
    best = exhaustive(values, budget.cost_model.branch_costs, budget.room)
    total = sum(row[costs[path].candidates.index(bits[path])] for path, row in values.items())
    assert total == pytest.approx(best, rel=1e-7)


def test_policy_depends_on_beta_and_on_nothing_random(context, grams, monkeypatch):
    monkeypatch.setattr(ompq, "gram_matrices", lambda context: grams)
    found = {}
    for beta in (0.0, 10.0, 300.0):
        changed = with_field(context, "ompq.beta", beta)
        found[beta] = ompq.choose(changed)
        assert found[beta] == ompq.choose(changed)
        # Layers of almost no importance still use what is left.
        spare = context.budget.limit - context.budget.cost(found[beta])
        for path, row in context.budget.cost_model.branch_costs.items():
            width = context.costs[path].candidates.index(found[beta][path])
            assert all(other - row[width] > spare for other in row[:width])
    assert found[0.0] != found[300.0]


@pytest.mark.parametrize("below", [True, False])
def test_policies_for_a_size_are_inside_it(below, weights_context, grams, caplog, monkeypatch):
    context, costs = weights_context, weights_context.costs
    known = registry.architecture_of(context.model)
    assert known.ompq_rounds_below
    changed = dataclasses.replace(known, ompq_rounds_below=below)
    monkeypatch.setitem(registry.ARCHITECTURES, known.name, changed)
    monkeypatch.setattr(ompq, "gram_matrices", lambda context: grams)
    model = context.budget.cost_model
    projected = []
    for limit in np.linspace(model.least, model.most, 23):
        here = with_budget(context, float(limit), "mebibytes")
        caplog.clear()
        with caplog.at_level(logging.INFO):
            bits = ompq.choose(here)
        projected.append("projected" in caplog.text)
        assert list(bits) == list(costs)
        assert all(pair in costs[path].candidates for path, pair in bits.items())
        spent = here.budget.cost(bits)
        assert spent <= limit * (1 + 1e-9)
        assert f"{spent:.4f} MiB of weights" in caplog.text
        for path in bits:
            if path.endswith("downsample_conv"):
                assert bits[path] == bits[path.replace("downsample_conv", "conv2")]
    assert bits == cost.uniform_bits(costs, 4, 8)  # the last budget allows 8 bits everywhere
    # Rounding down needs no projection; rounding to nearest needs one about half of the time.
    assert any(projected) != below
    assert not all(projected)


def test_policies_come_within_seconds(weights_context):
    started = time.monotonic()
    bits = ompq.choose(weights_context)
    assert time.monotonic() - started < 30  # on a busy machine
    assert set(bits) == set(weights_context.costs)
