import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamix_jax.errors import UserError
from metamix_jax.networks.precision import Bits, LayerCost
from metamix_jax.selection import cost, cost_models, knapsack
from metamix_jax.selection.budget import chosen_cost, hard_selection, make_budget
from metamix_jax.selection.cost_models import CostModel
from tests.helpers.hand_made_costs import (
    COSTS,
    FIXED,
    FIXED_BITS,
    PAIR_COSTS,
    PAIRS,
    REFERENCE,
    WEIGHT_COSTS,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SEARCHED = ("activations", "pairs", "weights")


def budget_of(value, unit, costs=COSTS):
    return make_budget(costs, value, unit)


def one_layer_model():
    candidates = {"layer": (Bits(3, 4), Bits(4, 4), Bits(8, 4))}
    return CostModel(
        "bops", "GBOPs", candidates, {"layer": (12.0, 16.0, 32.0)}, 0.0, reference=16.0
    )


def test_regulariser_anchor():
    # op = 1e9, b_w = 4, B = (3, 4, 8), logits 0: a tie goes to the first candidate.
    value, gradient = jax.value_and_grad(lambda logits: chosen_cost(one_layer_model(), logits))(
        {"layer": jnp.zeros(3)}
    )
    assert value == 12
    np.testing.assert_allclose(gradient["layer"], [-8 / 3, -4 / 3, 4.0], rtol=1e-6)


def test_expected_cost_is_the_mean_over_the_shares():
    logits = jnp.float32([0.3, -1, 2])
    share = np.exp(logits) / np.exp(logits).sum()
    value = chosen_cost(one_layer_model(), {"layer": logits}, "expected")
    np.testing.assert_allclose(value, share @ np.float32([12, 16, 32]), rtol=1e-6)
    argmax, expected = (
        jax.grad(lambda logits, form=form: chosen_cost(one_layer_model(), logits, form))(
            {"layer": logits}
        )["layer"]
        for form in ("argmax", "expected")
    )
    np.testing.assert_allclose(argmax, expected, rtol=1e-5)


@pytest.mark.parametrize("unit", ["gbops", "average_act_bits"])
@pytest.mark.parametrize("costs", [COSTS, PAIR_COSTS, WEIGHT_COSTS], ids=SEARCHED)
def test_chosen_cost_is_the_cost_of_the_argmax_policy(costs, unit):
    budget = budget_of(0.5 if unit == "gbops" else 4.0, unit, costs)
    candidates = costs["a"].candidates
    number = len(candidates)
    spent_on = jax.jit(lambda logits: chosen_cost(budget.cost_model, logits))
    for picks in itertools.product(range(number), repeat=2):
        chosen = dict(zip("ab", picks, strict=True))
        logits = {path: 3.0 * jax.nn.one_hot(k, number) for path, k in chosen.items()}
        bits = FIXED_BITS | {path: candidates[k] for path, k in chosen.items()}
        expected = cost.average_act_bits(costs, bits)
        if unit == "gbops":
            expected = cost.bops(costs, bits) / 1e9
        assert budget.cost(bits) == pytest.approx(expected, rel=1e-12)
        np.testing.assert_allclose(spent_on(logits), expected, rtol=1e-6)


def test_expected_cost_of_pairs_by_hand():
    budget = budget_of(0.5, "gbops", PAIR_COSTS)
    logits = {path: np.float32(np.linspace(-1, end, 9)) for path, end in (("a", 1), ("b", -3))}
    products = np.array([act * weight for act, weight in PAIRS])
    expected = FIXED
    for path, gmacs in (("a", 0.01), ("b", 0.03)):
        share = np.exp(logits[path]) / np.exp(logits[path]).sum()
        expected += gmacs * (share @ products)
    found = chosen_cost(
        budget.cost_model, {path: jnp.asarray(row) for path, row in logits.items()}, "expected"
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_hard_selection_is_exactly_one_hot(wrap):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(500, 3)), jnp.float32)
    select = jax.vmap(lambda row: hard_selection(jax.nn.softmax(row)))
    one_hot = np.eye(3, dtype=np.float32)[np.argmax(logits, axis=-1)]
    np.testing.assert_array_equal(wrap(select)(logits), one_hot)


def test_hard_selection_takes_the_first_of_a_tie():
    np.testing.assert_array_equal(hard_selection(jnp.float32([0.2, 0.4, 0.4])), [0, 1, 0])


def test_hard_selection_has_the_softmaxs_jacobian():
    logits = jnp.float32([0.5, -1.0, 1.5, 0.0])
    hard = jax.jacobian(lambda row: hard_selection(jax.nn.softmax(row)))(logits)
    np.testing.assert_array_equal(hard, jax.jacobian(jax.nn.softmax)(logits))
    share = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(hard, np.diag(share) - np.outer(share, share), atol=1e-6)


def test_budget_in_gbops():
    budget = budget_of(0.5, "gbops")
    assert (budget.limit, budget.cost_model.unit) == (0.5, "GBOPs")
    assert budget.cost_model.fixed_cost == pytest.approx(FIXED, rel=1e-12)
    assert budget.cost_model.reference == pytest.approx(REFERENCE, rel=1e-12)
    assert budget.cost_model.branch_costs == {
        "a": pytest.approx((0.32, 0.16, 0.08)),
        "b": pytest.approx((0.96, 0.48, 0.24)),
    }


def test_budget_as_fraction():
    budget = budget_of(0.9, "fraction")
    assert budget.limit == pytest.approx(0.9 * REFERENCE, rel=1e-12)
    assert budget.cost_model == budget_of(0.5, "gbops").cost_model
    assert budget.cost(cost.uniform_bits(COSTS, 4)) == pytest.approx(REFERENCE, rel=1e-12)


def test_budget_in_average_bits():
    budget = budget_of(3.5, "average_act_bits")
    model = budget.cost_model
    assert (budget.limit, model.fixed_cost, model.unit) == (3.5, 0.0, "average bits")
    assert budget.cost_model.branch_costs == {"a": (6.0, 3.0, 1.5), "b": (2.0, 1.0, 0.5)}
    bits = FIXED_BITS | {"a": Bits(8, 4), "b": Bits(2, 4)}
    assert budget.cost(bits) == 6.5


@pytest.mark.parametrize("costs", [PAIR_COSTS, WEIGHT_COSTS], ids=SEARCHED[1:])
def test_budget_in_mebibytes(costs):
    budget = budget_of(1e-3, "mebibytes", costs)
    unit = 8 * 2**20
    fixed = (27 + 640) * 8 / unit
    assert (budget.limit, budget.cost_model.unit) == (1e-3, "MiB")
    assert budget.cost_model.fixed_cost == pytest.approx(fixed, rel=1e-12)
    assert budget.cost_model.reference == pytest.approx(fixed + 800 * 4 / unit, rel=1e-12)
    for path, elements in (("a", 200), ("b", 600)):
        expected = [elements * bits.weight / unit for bits in costs[path].candidates]
        assert budget.cost_model.branch_costs[path] == pytest.approx(expected, rel=1e-12)
    assert budget.cost(cost.uniform_bits(costs, 4)) == pytest.approx(budget.cost_model.reference)


def test_budget_of_pairs_in_gbops():
    budget = budget_of(0.5, "gbops", PAIR_COSTS)
    assert budget.cost_model.fixed_cost == pytest.approx(FIXED, rel=1e-12)
    assert budget.cost_model.reference == pytest.approx(REFERENCE, rel=1e-12)
    assert budget.cost_model.branch_costs == {
        "a": pytest.approx((0.64, 0.32, 0.16, 0.32, 0.16, 0.08, 0.16, 0.08, 0.04), rel=1e-12),
        "b": pytest.approx((1.92, 0.96, 0.48, 0.96, 0.48, 0.24, 0.48, 0.24, 0.12), rel=1e-12),
    }
    bits = FIXED_BITS | {"a": Bits(8, 2), "b": Bits(2, 8)}
    assert budget.cost(bits) == pytest.approx(FIXED + 0.16 + 0.48, rel=1e-12)
    fraction = budget_of(0.9, "fraction", PAIR_COSTS)
    assert fraction.limit == pytest.approx(0.9 * REFERENCE, rel=1e-12)
    assert fraction.cost_model.branch_costs == budget.cost_model.branch_costs
    uniform = cost.uniform_bits(PAIR_COSTS, 4)
    assert fraction.cost(uniform) == pytest.approx(REFERENCE, rel=1e-12)


def test_budget_of_searched_weights_alone():
    budget = budget_of(0.5, "gbops", WEIGHT_COSTS)
    assert budget.cost_model.reference == pytest.approx(REFERENCE, rel=1e-12)
    assert budget.cost_model.branch_costs == {
        "a": pytest.approx((0.32, 0.16, 0.08), rel=1e-12),
        "b": pytest.approx((0.96, 0.48, 0.24), rel=1e-12),
    }


def test_budget_of_pairs_in_average_bits_counts_activations_alone():
    budget = budget_of(3.5, "average_act_bits", PAIR_COSTS)
    model = budget.cost_model
    assert (budget.limit, model.fixed_cost, model.unit) == (3.5, 0.0, "average bits")
    assert budget.cost_model.branch_costs == {
        "a": (6.0, 6.0, 6.0, 3.0, 3.0, 3.0, 1.5, 1.5, 1.5),
        "b": (2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5),
    }
    for weight in (8, 4, 2):
        bits = FIXED_BITS | {"a": Bits(8, weight), "b": Bits(2, 4)}
        assert budget.cost(bits) == 6.5


def test_a_policy_of_other_bits_has_no_cost():
    budget = budget_of(0.5, "gbops")
    with pytest.raises(ValueError):
        budget.cost(FIXED_BITS | {"a": Bits(4, 2), "b": Bits(4, 4)})


@pytest.mark.parametrize(
    ("costs", "value", "unit", "least", "most", "nearest"),
    [
        (COSTS, 0.4, "gbops", "0.416", "1.376", 0.416),
        (COSTS, 0.5, "fraction", "0.416", "1.376", 0.416 / REFERENCE),
        (COSTS, 1.9, "average_act_bits", "2", "8", 2.0),
        (PAIR_COSTS, 0.25, "gbops", "0.256", "2.656", 0.256),
        (WEIGHT_COSTS, 0.4, "gbops", "0.416", "1.376", 0.416),
        (WEIGHT_COSTS, 3.9, "average_act_bits", "4", "4", 4.0),
    ],
)
def test_infeasible_budgets_say_what_is_reachable(costs, value, unit, least, most, nearest):
    with pytest.raises(UserError) as caught:
        budget_of(value, unit, costs)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"config.budget.value={value} ({unit}) is ")
    assert f"reaches {least} to {most} " in message
    assert float(re.search(r"nearest feasible value: (\S+)$", message)[1]) == pytest.approx(nearest)


@pytest.mark.parametrize("value", [2.0, 1e6, 1e300])
@pytest.mark.parametrize("unit", ["gbops", "fraction"])
def test_a_budget_above_the_greatest_admits_every_policy(unit, value):
    budget = budget_of(value, unit, COSTS)
    assert budget.limit == budget.cost_model.most
    widest = {path: max(cost.candidates, key=math.prod) for path, cost in COSTS.items()}
    assert budget.admits(widest)
    choice = knapsack.spend(
        budget.cost_model.branch_costs, budget.cost_model.branch_costs, budget.room
    )
    assert budget.cost_model.cost_of(choice) == pytest.approx(budget.cost_model.most)


def test_budgets_that_can_be_met_by_unit():
    found = cost_models.reachable(COSTS)
    assert found.keys() == {"gbops", "fraction", "average_act_bits"}  # one weight width
    assert found["gbops"] == pytest.approx((0.416, 1.376))
    assert found["fraction"] == pytest.approx((0.416 / REFERENCE, 1.376 / REFERENCE))
    assert found["average_act_bits"] == pytest.approx((2, 8))
    assert cost_models.reachable(WEIGHT_COSTS).keys() == {"gbops", "fraction", "mebibytes"}
    for unit, ends in found.items():
        for value in ends:
            budget_of(value, unit, COSTS)


@pytest.mark.parametrize("unit", ["gbops", "fraction", "average_act_bits", "mebibytes"])
@pytest.mark.parametrize("value", [1e-6])
@pytest.mark.parametrize("candidates", [((8, 4, 3), (4,)), ((8, 4, 3), (7, 3)), ((5,), (4, 3))])
def test_the_nearest_feasible_value_is_feasible(candidates, value, unit):
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(50):
        numbers = zip("abc", *rng.integers(1_000, 10**8, (2, 3)).tolist(), strict=True)
        costs = COSTS | {
            path: LayerCost(macs, elements, 1, *candidates) for path, macs, elements in numbers
        }
        with pytest.raises(UserError) as caught:
            budget_of(value, unit, costs)
        nearest = float(str(caught.value).rsplit(" ", 1)[1])
        try:
            budget_of(nearest, unit, costs)
        except UserError as error:
            refused.append(str(error))
    assert refused == []


@pytest.mark.parametrize("costs", [COSTS, PAIR_COSTS, WEIGHT_COSTS], ids=SEARCHED)
def test_the_rounded_figures_of_a_table_are_not_needed_at_the_ends(costs):
    totals = cost.totals(costs)
    for name in ("gbops_min", "gbops_max"):
        assert budget_of(totals[name], "gbops", costs).limit == totals[name]


@pytest.mark.parametrize(("least", "expected"), [(0.0, 0), (0.05, 0), (0.2, 1), (0.9, 1)])
def test_spending_keeps_to_its_lower_bound(least, expected):
    """Even if the best choice is cheaper."""
    choice = knapsack.spend({"a": [1.0, 0.0]}, {"a": [0.1, 0.9]}, 1.0, least)
    assert choice == {"a": expected}
