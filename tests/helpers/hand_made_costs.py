"""Hand-made network costs for tests: two searched layers between two fixed ones."""

import dataclasses

from metamix_jax.networks.precision import Bits, LayerCost
from metamix_jax.selection.cost_models import Latencies

BITS = (8, 4, 2)
PAIRS = (
    Bits(8, 8), Bits(8, 4), Bits(8, 2), Bits(4, 8), Bits(4, 4), Bits(4, 2), Bits(2, 8), Bits(2, 4),
    Bits(2, 2),
)  # fmt: skip
FIXED_BITS = {"first": Bits(8, 8), "last": Bits(8, 8)}
COSTS = {
    "first": LayerCost(
        macs=1_000_000, act_elements=192, weight_elements=27, act_bits=(8,), weight_bits=(8,)
    ),
    "a": LayerCost(
        macs=10_000_000, act_elements=300, weight_elements=200, act_bits=BITS, weight_bits=(4,)
    ),
    "b": LayerCost(
        macs=30_000_000, act_elements=100, weight_elements=600, act_bits=BITS, weight_bits=(4,)
    ),
    "last": LayerCost(
        macs=500_000, act_elements=64, weight_elements=640, act_bits=(8,), weight_bits=(8,)
    ),
}
FIXED = (1_000_000 + 500_000) * 64 / 1e9  # GBOPs
REFERENCE = FIXED + 40_000_000 * 16 / 1e9  # of uniform 4/4


def with_bits(**fields):
    """Returns COSTS with other candidates in both searched layers."""
    searched = {path: dataclasses.replace(COSTS[path], **fields) for path in "ab"}
    return COSTS | searched


PAIR_COSTS = with_bits(weight_bits=BITS)
WEIGHT_COSTS = with_bits(act_bits=(4,), weight_bits=BITS)  # only weights are searched
# Milliseconds that fall with the bits of one layer and rise with those of the other.
LATENCIES = Latencies(
    {
        path: {bits: 1 + sign * (bits.act + 0.1 * bits.weight) / 20 for bits in layer.candidates}
        for (path, layer), sign in zip(PAIR_COSTS.items(), (0, 1, -1, 0), strict=True)
    },
    rest=0.5,
)
