"""Cost models against explicit sums, and the one place where a cost is compared with a limit."""

import ast
import itertools

import numpy as np
import pytest

from metamix_jax.networks.precision import Bits
from metamix_jax.selection import cost
from metamix_jax.selection.budget import Budget, within
from metamix_jax.selection.cost_models import BUDGET_UNITS
from tests.helpers.config_fields import ROOT
from tests.helpers.hand_made_costs import FIXED_BITS, LATENCIES, PAIR_COSTS

MODELS = {unit: kind.model(PAIR_COSTS, LATENCIES) for unit, kind in BUDGET_UNITS.items()}
SUMS = {
    "bops": lambda bits: cost.bops(PAIR_COSTS, bits) / 1e9,
    "average_act_bits": lambda bits: cost.average_act_bits(PAIR_COSTS, bits),
    "weights": lambda bits: (
        sum(PAIR_COSTS[path].weight_elements * pair.weight for path, pair in bits.items()) / 2**23
    ),
    "latency": lambda bits: 0.5 + sum(LATENCIES.layers[path][bits[path]] for path in PAIR_COSTS),
}


def test_every_unit_is_of_a_model_that_is_known_by_its_name():
    assert {model.name for model in MODELS.values()} == set(SUMS)
    assert MODELS["fraction"] == MODELS["gbops"]


@pytest.mark.parametrize("unit", BUDGET_UNITS)
def test_a_model_counts_every_pair_of_candidates(unit):
    model = MODELS[unit]
    assert model.candidates == {path: PAIR_COSTS[path].candidates for path in "ab"}
    found = []
    for picks in itertools.product(range(9), repeat=2):
        choice = dict(zip("ab", picks, strict=True))
        bits = cost.bits_at(PAIR_COSTS, choice)
        assert bits.items() >= FIXED_BITS.items()
        assert model.cost(bits) == model.cost_of(choice)
        assert model.cost(bits) == pytest.approx(SUMS[model.name](bits), rel=1e-12)
        found.append(model.cost(bits))
    assert (model.least, model.most) == (min(found), max(found))
    if model.name == "latency":
        assert model.reference == pytest.approx(model.most, rel=1e-12)
        return
    uniform = cost.uniform_bits(PAIR_COSTS, 4)
    assert model.reference == pytest.approx(model.cost(uniform), rel=1e-12)


@pytest.mark.parametrize("unit", BUDGET_UNITS)
def test_a_budget_admits_its_own_limit_but_for_rounding(unit):
    bits = FIXED_BITS | {"a": Bits(8, 4), "b": Bits(2, 8)}
    spent = MODELS[unit].cost(bits)
    for factor, admitted in ((1, True), (1 - 9e-10, True), (1 - 2e-9, False), (2, True)):
        budget = Budget(MODELS[unit], factor * spent)
        assert budget.admits(bits) == admitted
        assert budget.cost(bits) == spent
        assert budget.room == budget.limit - MODELS[unit].fixed_cost


def test_an_array_of_costs_is_held_to_a_limit():
    assert within(np.array([1.0, 1 + 5e-10, 1 + 2e-9]), 1.0).tolist() == [True, True, False]


def test_no_code_tells_a_cost_by_the_words_of_its_unit():
    words = {model.unit for model in MODELS.values()}
    for path in (ROOT / "metamix_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not texts & words, f"{path}:{node.lineno}"
