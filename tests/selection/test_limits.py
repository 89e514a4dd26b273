"""Several limits at once: against all policies of a small network."""

import itertools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.selection import cost, knapsack, limits
from metamix_jax.selection.budget import Budget, within
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost_models import BUDGET_UNITS
from metamix_jax.selection.searchers import metamix, random, uniform
from tests.helpers.hand_made_costs import LATENCIES, PAIR_COSTS

UNITS = [unit for unit in BUDGET_UNITS if unit != "gbops"]  # of the same model as fraction
MODELS = {unit: BUDGET_UNITS[unit].model(PAIR_COSTS, LATENCIES) for unit in UNITS}
PICKS = [dict(zip("ab", picks, strict=True)) for picks in itertools.product(range(9), repeat=2)]
SETS = [units for size in (2, 3, 4) for units in itertools.permutations(UNITS, size)]


def budget_at(units, generator):
    """Returns a budget in several units that one policy, at least, keeps."""
    known = PICKS[generator.integers(len(PICKS))]
    slack = 1 + generator.uniform(0, 0.3, len(units)) * generator.integers(0, 2, len(units))
    parts = [
        Budget(MODELS[unit], MODELS[unit].cost_of(known) * more)
        for unit, more in zip(units, slack, strict=True)
    ]
    return Budget(parts[0].cost_model, parts[0].limit, tuple(parts[1:]))


def kept(budget):
    """Returns the choices within all limits, by adding up."""
    every = (budget, *budget.further)
    return [
        pick for pick in PICKS if all(within(e.cost_model.cost_of(pick), e.limit) for e in every)
    ]


def bits(pick):
    return cost.bits_at(PAIR_COSTS, pick)


@pytest.mark.parametrize("units", SETS, ids="-".join)
def test_the_best_policy_keeps_all_limits(units):
    generator = np.random.default_rng(len("".join(units)))
    for _ in range(4):
        budget = budget_at(units, generator)
        inside = kept(budget)
        assert [pick for pick in PICKS if budget.admits(bits(pick))] == inside
        values = {path: generator.normal(size=9) for path in "ab"}

        def worth(pick, values=values):
            return sum(values[path][k] for path, k in pick.items())

        found = knapsack.best_policy(values, PAIR_COSTS, budget)
        assert found == bits(max(inside, key=worth))
        costs = [budget.cost_model.cost_of(pick) for pick in inside]
        assert knapsack.dearest(budget) == pytest.approx(max(costs), rel=2e-3)


@pytest.mark.parametrize("units", SETS[::3], ids="-".join)
def test_searchers_keep_all_limits(units):
    generator = np.random.default_rng(1)
    for least_spent in (0.0, 0.99):
        budget = budget_at(units, generator)
        inside = kept(budget)
        logits = {path: 3 * generator.normal(size=9) for path in "ab"}
        config = ConfigDict({"search": {"least_spent": least_spent}, "seed": 0})
        context = SearchContext(None, PAIR_COSTS, budget, config, {}, logits, None)

        def log_share(pick, logits=logits):
            return sum(float(jax.nn.log_softmax(logits[path])[k]) for path, k in pick.items())

        if not least_spent:
            assert metamix.choose(context) == bits(max(inside, key=log_share))
        else:
            spent = budget.cost(metamix.choose(context))
            most = max(budget.cost_model.cost_of(pick) for pick in inside)
            wanted = min(0.99 * budget.limit, most) * (1 - 2e-3)
            assert spent >= wanted or not budget.cost_model.worth_spending
        assert budget.admits(metamix.choose(context))
        drawn = random.choose(context)
        assert budget.admits(drawn)
        assert budget.cost(drawn) >= 0.985 * knapsack.dearest(budget)


def test_limits_are_read_and_checked():
    assert limits.parse("mebibytes=0.25") == ("mebibytes", 0.25)
    assert limits.are_limits(("mebibytes=0.25", "fraction=1"))
    for texts in (("mebibytes",), ("mib=1",), ("gbops=0",), ("gbops=nan",), ("gbops=1", "gbops=2"),
                  (3,)):  # fmt: skip
        assert not limits.are_limits(texts)


def config_budget(value, unit, *texts):
    return ConfigDict({"value": value, "unit": unit, "limits": texts, "latencies": ""})


def test_a_budget_of_two_units_is_met_to_the_digit():
    model = MODELS["mebibytes"]
    known = PICKS[40]
    least = model.cost_of(known)
    found = limits.budget_of(
        PAIR_COSTS, config_budget(1.0, "fraction", f"mebibytes={least:.17g}"), moments=tuple
    )
    assert [each.cost_model for each in found.further] == [model]
    chosen = knapsack.best_policy(MODELS["fraction"].branch_costs, PAIR_COSTS, found)
    assert model.cost(chosen) <= least
    assert "GBOPs, above the budget of" in found.excess(cost.uniform_bits(PAIR_COSTS, 8))
    assert "MiB, above the budget of" in found.excess(cost.uniform_bits(PAIR_COSTS, 2, 8))


def test_a_limit_that_no_policy_keeps():
    text = f"mebibytes={MODELS['mebibytes'].least / 2}"
    with pytest.raises(UserError, match=r"budget.limits=.* \(mebibytes\) .*nearest feasible value"):
        limits.budget_of(PAIR_COSTS, config_budget(1.0, "fraction", text), moments=tuple)


def test_limits_that_no_policy_keeps_together(tmp_path):
    """Milliseconds fall with the bits of layer b: few bits and little time exclude each other."""
    path = tmp_path / "latencies.csv"
    rows = ["layer,act_bits,weight_bits,milliseconds", "rest,,,0.5"]
    rows += [
        f"{layer},{pair.act},{pair.weight},{time}"
        for layer, times in LATENCIES.layers.items() for pair, time in times.items()
    ]  # fmt: skip
    path.write_text("\n".join(rows))
    table = config_budget(2.1, "average_act_bits", "milliseconds=4.3")
    table.latencies = str(path)
    time = MODELS["milliseconds"]
    inside = [p for p in PICKS if MODELS["average_act_bits"].cost_of(p) <= 2.1]
    reachable = min(time.cost_of(pick) for pick in inside)
    assert time.least < 4.3 < reachable
    with pytest.raises(UserError) as caught:
        limits.budget_of(PAIR_COSTS, table, moments=tuple)
    text = str(caught.value)
    assert "no policy keeps 2.1 average bits and 4.3 ms" in text and "\n" not in text
    assert f"{reachable:.6g} ms" in text


def test_uniform_names_the_limit_that_is_exceeded():
    config = ConfigDict({"search": {"uniform_bits": 8}})
    budget = Budget(MODELS["fraction"], 99.0, (Budget(MODELS["mebibytes"], 1e-4),))
    with pytest.raises(UserError, match=r"uniform_bits=8: .* MiB, above the budget of 0.0001"):
        uniform.check_network(config, PAIR_COSTS, budget)
