import csv
import io

import pytest

from metamix_jax.networks.precision import Bits, LayerCost, Precision, QuantSettings
from metamix_jax.selection import cost
from tests.helpers import zoo
from tests.helpers.hand_made_costs import (
    BITS,
    COSTS,
    FIXED,
    FIXED_BITS,
    PAIR_COSTS,
    REFERENCE,
    WEIGHT_COSTS,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def costs_of(name, size, settings=None, classes=10, **fields):
    settings = settings or QuantSettings(act_bits=BITS)
    shape = (size, size, 3)
    return zoo.layer_costs(name, settings, shape, classes, **fields)


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
    bits = FIXED_BITS | {"a": Bits(2, 4), "b": Bits(8, 4)}
    expected = 1_000_000 * 64 + 10_000_000 * 8 + 30_000_000 * 32 + 500_000 * 64
    assert cost.bops(COSTS, bits) == expected
    four = FIXED_BITS | {"a": Bits(4, 4), "b": Bits(4, 4)}
    assert cost.uniform_bits(COSTS, 4) == four
    assert cost.totals(COSTS) == {
        "macs": 41_500_000,
        "gbops_uniform": {
            str(b): pytest.approx(FIXED + 40e6 * 4 * b / 1e9, rel=1e-12) for b in BITS
        },
        "gbops_min": pytest.approx(FIXED + 0.32, rel=1e-12),
        "gbops_max": pytest.approx(FIXED + 1.28, rel=1e-12),
    }


def test_bops_and_totals_of_pairs_by_hand():
    bits = FIXED_BITS | {"a": Bits(8, 2), "b": Bits(2, 8)}
    expected = 1_000_000 * 64 + 10_000_000 * 16 + 30_000_000 * 16 + 500_000 * 64
    assert cost.bops(PAIR_COSTS, bits) == expected
    assert cost.bops(PAIR_COSTS, bits | {"b": Bits(4, 2)}) == expected - 30_000_000 * 8
    assert cost.totals(PAIR_COSTS) == {
        "macs": 41_500_000,
        "gbops_uniform": {
            str(b): pytest.approx(FIXED + 40e6 * b * b / 1e9, rel=1e-12) for b in BITS
        },
        "gbops_min": pytest.approx(FIXED + 0.16, rel=1e-12),
        "gbops_max": pytest.approx(FIXED + 2.56, rel=1e-12),
    }
    totals = cost.totals(WEIGHT_COSTS)
    assert totals["gbops_min"] == pytest.approx(FIXED + 0.32, rel=1e-12)
    assert totals["gbops_max"] == pytest.approx(FIXED + 1.28, rel=1e-12)


@pytest.mark.parametrize(
    ("costs", "arguments", "expected"),
    [
        (COSTS, (8,), Bits(8, 4)),
        (COSTS, (8, 2), Bits(8, 4)),
        (PAIR_COSTS, (8,), Bits(8, 8)),
        (PAIR_COSTS, (8, 2), Bits(8, 2)),
        (PAIR_COSTS, (2, 4), Bits(2, 4)),
        (WEIGHT_COSTS, (2,), Bits(4, 2)),
        (WEIGHT_COSTS, (2, 8), Bits(4, 8)),
    ],
)
def test_uniform_bits_are_those_of_the_searched_widths_alone(costs, arguments, expected):
    found = cost.uniform_bits(costs, *arguments)
    assert found == FIXED_BITS | {"a": expected, "b": expected}
    assert list(found) == list(costs)


@pytest.mark.parametrize(
    ("costs", "widest", "narrowest"),
    [
        (COSTS, Bits(8, 4), Bits(2, 4)),
        (PAIR_COSTS, Bits(8, 8), Bits(2, 2)),
        (WEIGHT_COSTS, Bits(4, 8), Bits(4, 2)),
    ],
    ids=["activations", "pairs", "weights"],
)
def test_widest_and_narrowest_bits(costs, widest, narrowest):
    # For any order of the candidates.
    backwards = {
        path: layer.replace(act_bits=layer.act_bits[::-1], weight_bits=layer.weight_bits[::-1])
        for path, layer in costs.items()
    }
    for network in (costs, backwards):
        assert cost.widest_bits(network) == FIXED_BITS | {"a": widest, "b": widest}
        assert cost.narrowest_bits(network) == FIXED_BITS | {"a": narrowest, "b": narrowest}


@pytest.mark.parametrize("weight_bits", [(2,), (8, 3, 2)])
def test_uniform_4_4_does_not_depend_on_candidates_or_weight_bits(weight_bits):
    settings = QuantSettings(act_bits=(8, 3), weight_bits=weight_bits)
    odd = costs_of("cifar_resnet", 32, settings, depth=20, width=16, shortcut="identity")
    assert rounded(cost.uniform_4_4(odd) / 1e9) == 0.6701


def test_pairs_cost_the_product_of_their_bits_in_a_real_network():
    fixed, pairs = (
        costs_of(
            "cifar_resnet", 32, QuantSettings(act_bits=BITS, weight_bits=weight_bits),
            depth=20, width=16, shortcut="identity",
        )
        for weight_bits in ((4,), BITS)
    )  # fmt: skip
    assert [layer.macs for layer in pairs.values()] == [layer.macs for layer in fixed.values()]
    assert rounded(cost.totals(pairs)["gbops_uniform"]["4"]) == 0.6701
    ends = sum(layer.macs * 64 for layer in pairs.values() if not layer.searched) / 1e9
    searched = cost.uniform_4_4(pairs) / 1e9 - ends
    for name, factor in (("gbops_max", 64 / 16), ("gbops_min", 4 / 16)):
        expected = ends + factor * searched
        assert cost.totals(pairs)[name] == pytest.approx(expected, rel=1e-12)


def test_average_act_bits_by_hand():
    # Weighted by input activations (300 and 100), not by MACs; fixed layers do not count.
    bits = FIXED_BITS | {"a": Bits(2, 4), "b": Bits(8, 4)}
    assert cost.average_act_bits(COSTS, bits) == (300 * 2 + 100 * 8) / 400
    assert cost.average_act_bits(COSTS, cost.uniform_bits(COSTS, 4)) == 4
    bits = FIXED_BITS | {"a": Bits(2, 8), "b": Bits(8, 2)}
    assert cost.average_act_bits(PAIR_COSTS, bits) == (300 * 2 + 100 * 8) / 400
    assert cost.average_act_bits(WEIGHT_COSTS, cost.uniform_bits(WEIGHT_COSTS, 8)) == 4


def test_average_weight_bits_by_hand():
    # Weighted by kernel sizes (200 and 600), not by MACs or activations.
    bits = FIXED_BITS | {"a": Bits(4, 8), "b": Bits(8, 2)}
    assert cost.average_weight_bits(PAIR_COSTS, bits) == (200 * 8 + 600 * 2) / 800
    assert cost.average_weight_bits(PAIR_COSTS, cost.uniform_bits(PAIR_COSTS, 8, 2)) == 2
    assert cost.average_weight_bits(COSTS, cost.uniform_bits(COSTS, 8)) == 4


def test_csv_round_trip():
    table = cost.rows(COSTS)
    read = list(csv.DictReader(io.StringIO(cost.to_csv(table))))
    kinds = {"layer": str, "macs": int, "act_bits": int, "weight_bits": int, "mbops": float}
    kinds["candidates"] = lambda text: tuple(text.split())
    assert [{key: kinds[key](text) for key, text in row.items()} for row in read] == table
    assert table[0]["candidates"] == ("8",)
    assert table[1] == {
        "layer": "a", "macs": 10_000_000, "act_bits": 4, "weight_bits": 4,
        "candidates": ("8", "4", "2"), "mbops": 160.0,
    }  # fmt: skip
    assert sum(row["mbops"] for row in table) / 1e3 == pytest.approx(REFERENCE, rel=1e-12)


def test_rows_of_pairs():
    first, row, *_ = cost.rows(PAIR_COSTS, reference_bits=2)
    assert first == {
        "layer": "first", "macs": 1_000_000, "act_bits": 8, "weight_bits": 8,
        "candidates": ("8",), "mbops": 64.0,
    }  # fmt: skip
    assert row == {
        "layer": "a", "macs": 10_000_000, "act_bits": 2, "weight_bits": 2, "mbops": 40.0,
        "candidates": ("8/8", "8/4", "8/2", "4/8", "4/4", "4/2", "2/8", "2/4", "2/2"),
    }  # fmt: skip
    text = cost.to_csv(cost.rows(PAIR_COSTS))
    assert text.splitlines()[2] == "a,10000000,4,4,8/8 8/4 8/2 4/8 4/4 4/2 2/8 2/4 2/2,160.0"
    assert cost.rows(WEIGHT_COSTS)[2]["candidates"] == ("4/8", "4/4", "4/2")


@pytest.mark.parametrize("candidates", [((8, 4), (4,)), ((8, 4), (4, 2))])
def test_what_is_not_quantized_counts_as_32_bits(candidates):
    costs = {"a": LayerCost(10**9, 1, 1, *candidates), "b": LayerCost(2 * 10**9, 1, 1, (8,), (8,))}
    weight = candidates[1][-1]
    bits = {"a": Bits(4, weight), "b": Bits(8, 8)}
    assert cost.gbops_at(costs, bits, Precision("chosen", "quantized")) == 4 * weight + 2 * 8 * 8
    assert cost.gbops_at(costs, bits, Precision("chosen")) == (4 + 2 * 8) * 32
    assert cost.gbops_at(costs, bits, Precision("full", "quantized")) == (weight + 2 * 8) * 32
    assert cost.gbops_at(costs, {}, Precision()) == 3 * 32 * 32
