import itertools
import logging

import numpy as np
import pytest
from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.networks.precision import Bits, LayerCost
from metamix_jax.selection import cost, knapsack, policy
from metamix_jax.selection.budget import make_budget
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.searchers import file, metamix, random, uniform

BITS = (8, 4, 2)
FIXED = {"first": Bits(8, 8), "last": Bits(8, 8)}
# act_bits, weight_bits
ACTIVATIONS, PAIRS, WEIGHTS = (BITS, (4,)), (BITS, BITS), ((4,), BITS)
SEARCHED = ("activations", "pairs", "weights")


def random_costs(rng, layers=4, searched=ACTIVATIONS):
    """Returns hand-made layers of a network, the first and last fixed at 8/8."""
    names = ["first", *(f"layer{i}" for i in range(layers)), "last"]
    costs = {}
    for name in names:
        act_bits, weight_bits = ((8,), (8,)) if name in FIXED else searched
        costs[name] = LayerCost(
            macs=int(rng.integers(10**5, 10**7)),
            act_elements=int(rng.integers(100, 10_000)),
            weight_elements=int(rng.integers(100, 10_000)),
            act_bits=act_bits,
            weight_bits=weight_bits,
        )
    return costs


def random_logits(rng, costs):
    return {
        path: rng.normal(size=len(layer.candidates)).astype(np.float32)
        for path, layer in costs.items()
        if layer.searched
    }


def argmax_of(logits, costs):
    """Returns the most probable bits of every layer."""
    picks = {path: int(np.argmax(row)) for path, row in logits.items()}
    return FIXED | {path: costs[path].candidates[k] for path, k in picks.items()}


def budget_of(costs, value, unit="gbops"):
    return make_budget(costs, value, unit)


PAPERS = ConfigDict({"search": {"least_spent": 0.0}})


def choose(searcher, logits, costs, budget, config):
    """Returns the choice of a searcher that only uses the logits."""
    return searcher.choose(SearchContext(None, costs, budget, config, {}, logits, None))


def all_choices(values):
    for picks in itertools.product(*(range(len(row)) for row in values.values())):
        yield dict(zip(values, picks, strict=True))


def total(table, choice):
    return sum(table[path][k] for path, k in choice.items())


def best_value(values, costs, limit):
    feasible = [c for c in all_choices(values) if total(costs, c) <= limit * (1 + 1e-12)]
    return max(total(values, choice) for choice in feasible)


def log_shares(logits):
    return {
        path: row.astype(float) - np.log(np.exp(row.astype(float)).sum())
        for path, row in logits.items()
    }


@pytest.mark.parametrize("seed", range(12))
def test_knapsack_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, size=5)
    values = {f"layer{i}": rng.normal(size=n).tolist() for i, n in enumerate(sizes)}
    costs = {f"layer{i}": rng.uniform(0.01, 3, size=n).tolist() for i, n in enumerate(sizes)}
    least = sum(min(row) for row in costs.values())
    most = sum(max(row) for row in costs.values())
    for limit in (least, 0.8 * least + 0.2 * most, 0.5 * (least + most), most, 2 * most):
        choice = knapsack.maximise(values, costs, limit)
        assert list(choice) == list(values)
        assert total(costs, choice) <= limit * (1 + 1e-9)
        assert total(values, choice) == pytest.approx(best_value(values, costs, limit), abs=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_knapsack_at_the_least_cost_takes_the_cheapest_everywhere(scale):
    rng = np.random.default_rng(5)
    costs = {f"layer{i}": (scale * rng.uniform(0.1, 3, size=3)).tolist() for i in range(20)}
    values = {path: row for path, row in costs.items()}  # the most expensive is worth most
    least = sum(min(row) for row in costs.values())
    choice = knapsack.maximise(values, costs, least)
    assert choice == {path: int(np.argmin(row)) for path, row in costs.items()}


@pytest.mark.parametrize("excess", [1e-8, 1e-7, 1e-6, 1e-5])
def test_knapsack_does_not_exceed_its_limit_by_a_little(excess):
    choice = knapsack.maximise({"layer": (0.0, 1.0)}, {"layer": (1.0, 1.0 + excess)}, 1.0)
    assert choice == {"layer": 0}


def test_knapsack_of_values_of_many_scales():
    # Layer i matters 10^-3i times as much as the first; the last layers still get what is left.
    values = {f"layer{i}": [0.0, 10.0 ** (-3 * i)] for i in range(100)}
    costs = {path: (1.0, 2.0) for path in values}
    choice = knapsack.maximise(values, costs, 150.0)
    assert list(choice.values()) == [1] * 50 + [0] * 50
    choice = knapsack.maximise({path: [0.0, 0.0] for path in values}, costs, 100.0)
    assert set(choice.values()) == {0}


def test_knapsack_without_a_feasible_choice():
    with pytest.raises(ValueError, match="no choice costs 1.0 or less"):
        knapsack.maximise({"layer": (0.0, 1.0)}, {"layer": (2.0, 3.0)}, 1.0)


@pytest.mark.parametrize("searched", [ACTIVATIONS, PAIRS, WEIGHTS], ids=SEARCHED)
@pytest.mark.parametrize("unit", ["gbops", "average_act_bits"])
@pytest.mark.parametrize("seed", range(4))
def test_argmax_inside_the_budget_is_kept(seed, unit, searched):
    rng = np.random.default_rng(seed)
    costs = random_costs(rng, searched=searched)
    logits = random_logits(rng, costs)
    argmax = argmax_of(logits, costs)
    spent = cost.bops(costs, argmax) / 1e9
    if unit == "average_act_bits":
        spent = cost.average_act_bits(costs, argmax)
    # At the limit itself too, for any order of summation.
    assert choose(metamix, logits, costs, budget_of(costs, spent, unit), PAPERS) == argmax


@pytest.mark.parametrize(
    ("searched", "unit"),
    [
        (ACTIVATIONS, "gbops"),
        (ACTIVATIONS, "average_act_bits"),
        (PAIRS, "gbops"),
        (PAIRS, "average_act_bits"),
        (WEIGHTS, "gbops"),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_argmax_above_the_budget_is_projected_to_the_most_probable_inside(
    seed, searched, unit, caplog
):
    rng = np.random.default_rng(100 + seed)
    costs = random_costs(rng, searched=searched)
    logits = random_logits(rng, costs)
    for row in logits.values():
        row[0] += 3  # towards 8 bits everywhere
    if unit == "gbops":
        totals = cost.totals(costs)
        value = 0.6 * totals["gbops_min"] + 0.4 * totals["gbops_max"]
        budget = budget_of(costs, value)
    else:
        budget = budget_of(costs, 4.0, "average_act_bits")
    argmax = argmax_of(logits, costs)
    assert budget.cost(argmax) > budget.limit
    with caplog.at_level(logging.INFO):
        chosen = choose(metamix, logits, costs, budget, PAPERS)
    assert list(sorted(chosen)) == sorted(costs)
    assert {path: chosen[path] for path in FIXED} == FIXED
    assert budget.cost(chosen) <= budget.limit * (1 + 1e-9)
    shares = log_shares(logits)
    value = total(shares, {path: costs[path].candidates.index(chosen[path]) for path in shares})
    best = best_value(shares, budget.cost_model.branch_costs, budget.room)
    assert value == pytest.approx(best, abs=1e-5)
    # The log lists the changes.
    for path in logits:
        note = "{} {}/{}->{}/{}".format(path, *argmax[path], *chosen[path])
        assert (note in caplog.text) == (argmax[path] != chosen[path])


@pytest.mark.parametrize("seed", range(4))
def test_argmax_far_below_the_budget_gives_way_to_the_most_probable_that_spends_it(seed, caplog):
    rng = np.random.default_rng(200 + seed)
    costs = random_costs(rng)
    logits = random_logits(rng, costs)
    for row in logits.values():
        row[-1] += 3  # towards 2 bits everywhere
    totals = cost.totals(costs)
    budget = budget_of(costs, 0.6 * totals["gbops_min"] + 0.4 * totals["gbops_max"])
    argmax = argmax_of(logits, costs)
    assert choose(metamix, logits, costs, budget, PAPERS) == argmax
    with caplog.at_level(logging.INFO):
        chosen = choose(
            metamix, logits, costs, budget, ConfigDict({"search": {"least_spent": 0.95}})
        )
    assert "far below the budget" in caplog.text
    spent = budget.cost(chosen)
    assert 0.95 * budget.limit * (1 - 1e-9) <= spent <= budget.limit * (1 + 1e-9)
    shares = log_shares(logits)
    best = max(
        total(shares, choice)
        for choice in all_choices(shares)
        if 0.95 * budget.limit <= budget.cost_model.cost_of(choice) <= budget.limit
    )
    value = total(shares, {path: costs[path].candidates.index(chosen[path]) for path in shares})
    assert value == pytest.approx(best, abs=1e-5)


def test_a_budget_that_cannot_be_spent_is_spent_as_far_as_it_can():
    costs = random_costs(np.random.default_rng(0))
    logits = random_logits(np.random.default_rng(0), costs)
    totals = cost.totals(costs)
    budget = budget_of(costs, 0.5 * totals["gbops_min"] + 0.5 * totals["gbops_max"])
    chosen = choose(metamix, logits, costs, budget, ConfigDict({"search": {"least_spent": 1.0}}))
    most = max(
        found
        for choice in all_choices(budget.cost_model.branch_costs)
        if (found := budget.cost_model.cost_of(choice)) <= budget.limit
    )
    assert budget.cost(chosen) == pytest.approx(most, rel=1e-6)


def test_budget_at_the_least_cost_leaves_the_narrowest_policy():
    rng = np.random.default_rng(0)
    costs = random_costs(rng, layers=12)
    for unit, least in (("gbops", cost.totals(costs)["gbops_min"]), ("average_act_bits", 2.0)):
        budget = budget_of(costs, least, unit)
        chosen = choose(metamix, random_logits(rng, costs), costs, budget, PAPERS)
        assert chosen == cost.uniform_bits(costs, 2)


def test_budget_at_the_least_cost_leaves_the_narrowest_pairs():
    rng = np.random.default_rng(0)
    costs = random_costs(rng, layers=12, searched=PAIRS)
    logits = random_logits(rng, costs)
    budget = budget_of(costs, cost.totals(costs)["gbops_min"])
    assert choose(metamix, logits, costs, budget, PAPERS) == cost.uniform_bits(costs, 2, 2)
    # A budget of activation bits leaves each layer its most probable weight bits.
    budget = budget_of(costs, 2.0, "average_act_bits")
    chosen = choose(metamix, logits, costs, budget, PAPERS)
    narrow = {path: Bits(2, BITS[int(np.argmax(row[-3:]))]) for path, row in logits.items()}
    assert chosen == FIXED | narrow


def test_ties_go_to_the_first_candidate():
    costs = random_costs(np.random.default_rng(0))
    budget = budget_of(costs, cost.totals(costs)["gbops_max"])
    logits = {path: np.zeros(3, np.float32) for path in costs if path not in ("first", "last")}
    assert choose(metamix, logits, costs, budget, PAPERS) == cost.uniform_bits(costs, 8)
    logits["layer0"] = np.float32([0, 1, 1])
    chosen = choose(metamix, logits, costs, budget, PAPERS)
    assert chosen == cost.uniform_bits(costs, 8) | {"layer0": Bits(4, 4)}


def test_a_comparison_takes_the_widest_uniform_network_within_the_budget():
    costs = random_costs(np.random.default_rng(0))
    config = ConfigDict({"quant": {"act_bits": BITS}})
    for width, next_wider in ((2, 4), (4, 8)):
        between = cost.bops(costs, cost.uniform_bits(costs, next_wider, 4)) / cost.GIGA - 1e-6
        budget = make_budget(costs, between, "gbops")
        assert uniform.fit(config, costs, budget) == {"search.uniform_bits": width}
    with pytest.raises(UserError, match="no uniform network is within"):
        uniform.fit(ConfigDict({"quant": {"act_bits": (8,)}}), costs, budget)


def test_uniform_takes_the_configured_bits():
    config = ConfigDict({"search": {"uniform_bits": 2}})
    for searched, pair in ((ACTIVATIONS, (2, 4)), (PAIRS, (2, 2)), (WEIGHTS, (4, 2))):
        costs = random_costs(np.random.default_rng(0), searched=searched)
        budget = budget_of(costs, 1.0, "fraction")
        expected = {path: Bits(*pair) for path in costs} | FIXED
        assert choose(uniform, {}, costs, budget, config) == expected


@pytest.mark.parametrize("fraction", [0.55, 0.7, 1.0, 1.5, 1.9])
@pytest.mark.parametrize("searched", [ACTIVATIONS, PAIRS], ids=["activations", "pairs"])
def test_random_spends_the_budget_and_depends_on_the_seed_alone(fraction, searched):
    costs = random_costs(np.random.default_rng(1), layers=30, searched=searched)
    totals = cost.totals(costs)
    value = totals["gbops_min"] + fraction / 2 * (totals["gbops_max"] - totals["gbops_min"])
    budget = budget_of(costs, value)
    found = [choose(random, {}, costs, budget, ConfigDict({"seed": seed})) for seed in (0, 0, 1, 2)]
    for bits in found:
        assert 0.99 * value <= budget.cost(bits) <= value * (1 + 1e-9)
    assert found[0] == found[1]
    assert len({tuple(bits.values()) for bits in found}) == 3


def test_random_prefers_no_policy_of_equal_cost():
    costs = {name: LayerCost(10**6, 10, 10, BITS, (4,)) for name in "abc"}
    # One layer at 4 bits and two at 2: 3 policies of the same cost.
    budget = budget_of(costs, 1e6 * (16 + 8 + 8) / 1e9)
    draws = [random.draw(budget, np.random.default_rng(seed)) for seed in range(300)]
    assert {tuple(sorted(draw.values())) for draw in draws} == {(1, 2, 2)}
    counts = np.bincount([list(draw.values()).index(1) for draw in draws])
    assert counts.min() > 70  # 100 each, plus or minus four standard deviations


def test_random_takes_what_comes_closest_where_nothing_costs_about_the_budget():
    costs = {"a": LayerCost(10**6, 10, 10, (8, 2), (4,))}
    assert random.draw(budget_of(costs, 0.02), np.random.default_rng(0)) == {"a": 1}


def test_random_says_so_where_it_found_nothing(monkeypatch):
    monkeypatch.setattr(random, "ROUNDS", 0)
    costs = {"a": LayerCost(10**6, 10, 10, (8, 2), (4,))}
    with pytest.raises(UserError, match="try another config.budget.value"):
        random.draw(budget_of(costs, 0.02), np.random.default_rng(0))


def test_file_takes_the_policy_of_another_resolution_and_minds_the_budget(tmp_path):
    small, large = (random_costs(np.random.default_rng(seed)) for seed in (0, 1))
    bits = cost.uniform_bits(small, 4) | {"layer0": Bits(2, 4)}
    facts = {"model": "m", "image_size": 8, "searcher": "asga", "seed": 0, "budget_gbops": None}
    path = tmp_path / "policy.json"
    policy.write_policy(path, policy.make_policy(small, bits, **facts))
    budget = budget_of(large, 1.0, "fraction")
    config = ConfigDict({"search": {"policy": str(path)}})
    assert choose(file, {}, large, budget, config) == bits
    with pytest.raises(UserError, match=r"costs .* GBOPs, above the budget of .*, in this network"):
        file.read_bits(str(path), large, budget_of(large, cost.totals(large)["gbops_min"]))
    with pytest.raises(UserError, match="not a readable policy file"):
        file.read_bits(str(tmp_path / "none.json"), large, budget)
