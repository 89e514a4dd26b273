"""Runs through `python main.py` that choose activation and weight bits together."""

import json

import pytest

from metamix_jax.training import setup
from tests.helpers.processes import command, rows_of, tiny_config

# Pairs of activation and weight bits; 3 steps in each of 3 phases, search steps with bit-meta's.
PAIRS = {
    "quant.weight_bits": (4, 2),
    "full_precision.epochs": 0.024,
    "bit_meta.epochs": 0,
    "bit_search.epochs": 0.024,
    "weight_training.act_epochs": 0,
    "weight_training.epochs": 0.024,
}


def searched_bits(workdir, costs):
    """Returns layer -> (activation bits, weight bits) of policy.json, without the fixed ends."""
    layers = json.loads((workdir / "policy.json").read_text())["layers"]
    assert list(layers) == list(costs)
    bits = {path: (row["act_bits"], row["weight_bits"]) for path, row in layers.items()}
    assert bits.pop("conv1") == bits.pop("fc") == (8, 8)
    return bits


def average(bits, sizes):
    return sum(bits[path] * sizes[path] for path in bits) / sum(sizes[path] for path in bits)


def test_search_over_pairs(processes, tmp_path):
    settings = PAIRS | {"budget.value": 0.7}
    workdir = tmp_path / "run"
    result = processes.result(command(f"--workdir={workdir}", **settings))
    costs = setup.make_network(tiny_config(**settings)).costs
    bits = searched_bits(workdir, costs)
    assert set(bits.values()) <= {(4, 4), (4, 2), (2, 4), (2, 2)}
    assert len({weight for _, weight in bits.values()}) == 2  # they differ between layers
    bit_operations = sum(costs[path].macs * act * weight for path, (act, weight) in bits.items())
    bit_operations += (costs["conv1"].macs + costs["fc"].macs) * 64
    assert result["gbops"] == pytest.approx(bit_operations / 1e9, rel=1e-12)
    assert result["gbops"] <= result["budget_gbops"]
    act_sizes = {path: costs[path].act_elements for path in bits}
    weight_sizes = {path: costs[path].weight_elements for path in bits}
    acts, weights = ({path: pair[i] for path, pair in bits.items()} for i in (0, 1))
    assert result["average_act_bits"] == pytest.approx(average(acts, act_sizes))
    assert result["average_weight_bits"] == pytest.approx(average(weights, weight_sizes))
    assert json.loads((workdir / "results.json").read_text()).items() >= result.items()

    rows = rows_of(workdir)
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, 3 * 3 + 1))
    evaluated = {}
    for row in rows:
        if row["kind"] == "eval":
            evaluated.setdefault(row["phase"], set()).add((row["precision"], row["weights"]))
    pairs = {(f"uniform {pair}", "quantized") for pair in ("4/4", "4/2", "2/4", "2/2")}
    assert evaluated == {
        "full_precision": {("full", "full")},
        "bit_search": pairs,
        "weight_training": {("chosen", "quantized")},
    }

    found = processes.result(command(f"--workdir={workdir}", "--mode=evaluate", **settings))
    for name in ("top1", "top5", "correct", "examples", "gbops"):
        assert found[name] == result[name], name


@pytest.mark.slow
def test_searcher_uniform_with_searched_weights(processes, tmp_path):
    settings = PAIRS | {"search.searcher": "uniform", "search.uniform_bits": 2}
    workdir = tmp_path / "run"
    result = processes.result(command(f"--workdir={workdir}", **settings))
    costs = setup.make_network(tiny_config(**settings)).costs
    assert set(searched_bits(workdir, costs).values()) == {(2, 2)}
    assert result["average_act_bits"] == result["average_weight_bits"] == 2
    assert max(row["step"] for row in rows_of(workdir)) == 6
