import dataclasses

import jax
import pytest

from metamix_jax.networks.precision import Bits, LayerCost, QuantSettings, bit_candidates
from tests.helpers.hand_made_costs import COSTS, PAIR_COSTS, PAIRS, WEIGHT_COSTS


def test_candidates_go_through_the_weight_bits_of_one_activation_width_first():
    assert bit_candidates((8, 4, 2), (8, 4, 2)) == PAIRS
    assert bit_candidates((2, 8), (3, 4, 5)) == ((2, 3), (2, 4), (2, 5), (8, 3), (8, 4), (8, 5))
    assert bit_candidates((8, 4), (4,)) == (Bits(8, 4), Bits(4, 4))
    assert bit_candidates((4,), (8, 2)) == (Bits(4, 8), Bits(4, 2))


@pytest.mark.parametrize(
    ("costs", "candidates"),
    [
        (COSTS, ((8, 4), (4, 4), (2, 4))),
        (PAIR_COSTS, PAIRS),
        (WEIGHT_COSTS, ((4, 8), (4, 4), (4, 2))),
    ],
    ids=["activations", "pairs", "weights"],
)
def test_candidates_of_a_layer(costs, candidates):
    for path in "ab":
        assert costs[path].searched
        assert costs[path].candidates == candidates
    for path in ("first", "last"):
        assert not costs[path].searched
        assert costs[path].candidates == ((8, 8),)


def test_a_cost_has_no_leaves():
    assert jax.tree.leaves(LayerCost(1, 2, 3, (8, 4), (8, 4))) == []


@pytest.mark.parametrize("weight_bits", [(4,), (8, 4, 2)])
def test_the_ends_of_a_network_are_fixed(weight_bits):
    settings = QuantSettings(
        act_bits=(8, 4, 2), weight_bits=weight_bits, first_last_bits=6, image_bits=7,
        init_rule="unshifted",
    )  # fmt: skip
    ends = dataclasses.replace(settings, act_bits=(6,), weight_bits=(6,))
    assert settings.ends() == ends
    assert settings.stem() == dataclasses.replace(ends, act_bits=(7,))
