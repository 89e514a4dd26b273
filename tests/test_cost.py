import csv
import io
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from metamix_jax import cost, models
from metamix_jax.cost import Budget, chosen_cost, hard_selection, make_budget
from metamix_jax.errors import UserError
from metamix_jax.layers import LayerCost, Precision, QuantSettings

pytestmark = pytest.mark.usefixtures("strict_dtypes")

BITS = (8, 4, 2)
# Hand-made: a fixed first and last layer at 8/8, and two searched ones.
COSTS = {
    "first": LayerCost(macs=1_000_000, act_elements=192, act_bits=(8,), weight_bits=8),
    "a": LayerCost(macs=10_000_000, act_elements=300, act_bits=BITS, weight_bits=4),
    "b": LayerCost(macs=30_000_000, act_elements=100, act_bits=BITS, weight_bits=4),
    "last": LayerCost(macs=500_000, act_elements=64, act_bits=(8,), weight_bits=8),
}
FIXED = (1_000_000 + 500_000) * 64 / 1e9
REFERENCE = FIXED + 40_000_000 * 16 / 1e9


def costs_of(name, size, settings=None, classes=10, **fields):
    settings = settings or QuantSettings(act_bits=BITS)
    model = models.make(ConfigDict({"name": name, **fields}), classes, settings)
    return cost.layer_costs(model, (size, size, 3))


def budget_of(value, unit, costs=COSTS):
    return make_budget(costs, ConfigDict({"value": value, "unit": unit}))


def rounded(value, digits=4):
    return round(value, digits)


def test_resnet18_anchors():
    costs = costs_of("resnet18", 224, classes=1000)
    macs = {path: layer.macs for path, layer in costs.items()}
    shortcuts = sum(number for path, number in macs.items() if "downsample" in path)
    assert len(costs) == 21
    assert rounded(sum(macs.values()) / 1e6, 3) == 1814.073
    assert rounded(macs["conv1"] / 1e6, 3) == 118.014
    assert rounded(shortcuts / 1e6, 3) == 19.268
    assert macs["fc"] == 512_000
    uniform = cost.totals(costs)["gbops_uniform"]
    assert rounded(uniform["4"]) == 34.7144
    assert rounded(cost.uniform_4_4(costs) / 1e9) == 34.7144
    assert rounded(uniform["8"], 2) == rounded((1695.547 * 32 + 118.526 * 64) / 1e3, 2)


@pytest.mark.parametrize(("shortcut", "gbops"), [("identity", 0.6701), ("conv", 0.6743)])
def test_resnet20_anchors(shortcut, gbops):
    costs = costs_of("cifar_resnet", 32, depth=20, width=16, shortcut=shortcut)
    assert len(costs) == {"identity": 20, "conv": 22}[shortcut]
    assert rounded(cost.uniform_4_4(costs) / 1e9) == gbops
    assert rounded(cost.totals(costs)["gbops_uniform"]["4"]) == gbops


def test_bops_and_totals_by_hand():
    bits = {"first": 8, "a": 2, "b": 8, "last": 8}
    expected = 1_000_000 * 64 + 10_000_000 * 8 + 30_000_000 * 32 + 500_000 * 64
    assert cost.bops(COSTS, bits) == expected
    assert cost.uniform_bits(COSTS, 4) == {"first": 8, "a": 4, "b": 4, "last": 8}
    assert cost.totals(COSTS) == {
        "macs": 41_500_000,
        "gbops_uniform": {
            str(b): pytest.approx(FIXED + 40e6 * 4 * b / 1e9, rel=1e-12) for b in BITS
        },
        "gbops_min": pytest.approx(FIXED + 0.32, rel=1e-12),
        "gbops_max": pytest.approx(FIXED + 1.28, rel=1e-12),
    }


def test_uniform_4_4_does_not_depend_on_candidates_or_weight_bits():
    settings = QuantSettings(act_bits=(8, 3), weight_bits=2)
    odd = costs_of("cifar_resnet", 32, settings, depth=20, width=16, shortcut="identity")
    assert rounded(cost.uniform_4_4(odd) / 1e9) == 0.6701


def test_average_act_bits_by_hand():
    # Weighted by input activations (300 and 100), not by MACs; fixed layers do not count.
    bits = {"first": 8, "a": 2, "b": 8, "last": 8}
    assert cost.average_act_bits(COSTS, bits) == (300 * 2 + 100 * 8) / 400
    assert cost.average_act_bits(COSTS, cost.uniform_bits(COSTS, 4)) == 4


def one_layer_budget():
    return Budget({"layer": (12.0, 16.0, 32.0)}, 0.0, limit=10.0, reference=16.0, unit="GBOPs")


def test_regulariser_anchor():
    # op = 1e9, b_w = 4, B = (3, 4, 8), logits 0: a tie goes to the first candidate.
    value, gradient = jax.value_and_grad(lambda logits: chosen_cost(one_layer_budget(), logits))(
        {"layer": jnp.zeros(3)}
    )
    assert value == 12
    np.testing.assert_allclose(gradient["layer"], [-8 / 3, -4 / 3, 4.0], rtol=1e-6)


def test_expected_cost_is_the_mean_over_the_shares():
    logits = jnp.float32([0.3, -1, 2])
    share = np.exp(logits) / np.exp(logits).sum()
    value = chosen_cost(one_layer_budget(), {"layer": logits}, "expected")
    np.testing.assert_allclose(value, share @ np.float32([12, 16, 32]), rtol=1e-6)
    argmax, expected = (
        jax.grad(lambda logits, form=form: chosen_cost(one_layer_budget(), logits, form))(
            {"layer": logits}
        )["layer"]
        for form in ("argmax", "expected")
    )
    np.testing.assert_allclose(argmax, expected, rtol=1e-5)


@pytest.mark.parametrize("unit", ["gbops", "average_act_bits"])
def test_chosen_cost_is_the_cost_of_the_argmax_policy(unit):
    budget = budget_of(0.5 if unit == "gbops" else 4.0, unit)
    for picks in itertools.product(range(3), repeat=2):
        logits = {path: 3.0 * jax.nn.one_hot(k, 3) for path, k in zip("ab", picks, strict=True)}
        bits = {"first": 8, "last": 8} | {p: BITS[k] for p, k in zip("ab", picks, strict=True)}
        expected = cost.average_act_bits(COSTS, bits)
        if unit == "gbops":
            expected = cost.bops(COSTS, bits) / 1e9
        assert budget.cost(bits, COSTS) == pytest.approx(expected, rel=1e-12)
        np.testing.assert_allclose(chosen_cost(budget, logits), expected, rtol=1e-6)


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
    assert (budget.limit, budget.unit) == (0.5, "GBOPs")
    assert budget.fixed_cost == pytest.approx(FIXED, rel=1e-12)
    assert budget.reference == pytest.approx(REFERENCE, rel=1e-12)
    assert budget.branch_costs == {
        "a": pytest.approx((0.32, 0.16, 0.08)),
        "b": pytest.approx((0.96, 0.48, 0.24)),
    }


def test_budget_as_fraction():
    budget = budget_of(0.9, "fraction")
    assert budget.limit == pytest.approx(0.9 * REFERENCE, rel=1e-12)
    assert budget.branch_costs == budget_of(0.5, "gbops").branch_costs
    assert budget.fixed_cost == budget_of(0.5, "gbops").fixed_cost
    assert budget.cost(cost.uniform_bits(COSTS, 4), COSTS) == pytest.approx(REFERENCE, rel=1e-12)


def test_budget_in_average_bits():
    budget = budget_of(3.5, "average_act_bits")
    assert (budget.limit, budget.fixed_cost, budget.unit) == (3.5, 0.0, "average bits")
    assert budget.branch_costs == {"a": (6.0, 3.0, 1.5), "b": (2.0, 1.0, 0.5)}
    assert budget.cost({"first": 8, "a": 8, "b": 2, "last": 8}, COSTS) == 6.5


@pytest.mark.parametrize(
    ("value", "unit", "least", "most", "nearest"),
    [
        (0.4, "gbops", "0.416", "1.376", 0.416),
        (1.4, "gbops", "0.416", "1.376", 1.376),
        (0.5, "fraction", "0.416", "1.376", 0.416 / REFERENCE),
        (2.0, "fraction", "0.416", "1.376", 1.376 / REFERENCE),
        (1.9, "average_act_bits", "2", "8", 2.0),
        (8.1, "average_act_bits", "2", "8", 8.0),
    ],
)
def test_infeasible_budgets_say_what_is_reachable(value, unit, least, most, nearest):
    with pytest.raises(UserError) as caught:
        budget_of(value, unit)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"config.budget.value={value} ({unit}) is ")
    assert f"reaches {least} to {most} " in message
    assert float(re.search(r"nearest feasible value: (\S+)$", message)[1]) == pytest.approx(nearest)


@pytest.mark.parametrize("unit", ["gbops", "fraction", "average_act_bits"])
@pytest.mark.parametrize("value", [1e-6, 1e6])
def test_the_nearest_feasible_value_is_feasible(value, unit):
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(50):
        numbers = zip("abc", *rng.integers(1_000, 10**8, (2, 3)).tolist(), strict=True)
        costs = COSTS | {
            path: LayerCost(macs=macs, act_elements=elements, act_bits=(8, 4, 3), weight_bits=4)
            for path, macs, elements in numbers
        }
        with pytest.raises(UserError) as caught:
            budget_of(value, unit, costs)
        nearest = float(str(caught.value).rsplit(" ", 1)[1])
        try:
            budget_of(nearest, unit, costs)
        except UserError as error:
            refused.append(str(error))
    assert refused == []


def test_the_rounded_figures_of_a_table_are_not_needed_at_the_ends():
    totals = cost.totals(COSTS)
    assert budget_of(totals["gbops_min"], "gbops").limit == totals["gbops_min"]
    assert budget_of(totals["gbops_max"], "gbops").limit == totals["gbops_max"]


def test_csv_round_trip():
    table = cost.rows(COSTS)
    read = list(csv.DictReader(io.StringIO(cost.to_csv(table))))
    kinds = {"layer": str, "macs": int, "act_bits": int, "weight_bits": int, "mbops": float}
    kinds["candidates"] = lambda text: tuple(map(int, text.split()))
    assert [{key: kinds[key](text) for key, text in row.items()} for row in read] == table
    assert table[1] == {
        "layer": "a", "macs": 10_000_000, "act_bits": 4, "weight_bits": 4,
        "candidates": BITS, "mbops": 160.0,
    }  # fmt: skip
    assert sum(row["mbops"] for row in table) / 1e3 == pytest.approx(REFERENCE, rel=1e-12)


def test_what_is_not_quantized_counts_as_32_bits():
    costs = {"a": LayerCost(10**9, 1, (8, 4), 4), "b": LayerCost(2 * 10**9, 1, (8,), 8)}
    bits = {"a": 4, "b": 8}
    assert cost.gbops_at(costs, bits, Precision("chosen", "quantized")) == 4 * 4 + 2 * 8 * 8
    assert cost.gbops_at(costs, bits, Precision("chosen")) == (4 + 2 * 8) * 32
    assert cost.gbops_at(costs, {}, Precision()) == 3 * 32 * 32
