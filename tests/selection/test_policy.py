import dataclasses
import json

import pytest

from metamix_jax.errors import UserError
from metamix_jax.networks.precision import Bits, LayerCost
from metamix_jax.selection import policy
from metamix_jax.selection.budget import make_budget


def costs_of(act_bits, weight_bits):
    """Returns the costs of a network whose two inner layers have these candidates."""
    fixed = {"act_bits": (8,), "weight_bits": (8,)}
    searched = {"act_bits": act_bits, "weight_bits": weight_bits}
    return {
        "conv1": LayerCost(macs=1_000_000, act_elements=64, weight_elements=9, **fixed),
        "layer1_0/conv1": LayerCost(5_000_000, act_elements=64, weight_elements=9, **searched),
        "layer1_0/conv2": LayerCost(7_000_000, act_elements=64, weight_elements=9, **searched),
        "fc": LayerCost(macs=10_000, act_elements=16, weight_elements=9, **fixed),
    }


COSTS = costs_of((8, 4, 2), (4,))
PAIR_COSTS = costs_of((8, 4, 2), (8, 4, 2))
ENDS = {"conv1": Bits(8, 8), "fc": Bits(8, 8)}
BITS = ENDS | {"layer1_0/conv1": Bits(2, 4), "layer1_0/conv2": Bits(4, 4)}
PAIR_BITS = ENDS | {"layer1_0/conv1": Bits(2, 8), "layer1_0/conv2": Bits(8, 2)}
FACTS = {"model": "tiny", "image_size": 8, "searcher": "metamix", "seed": 3, "budget_gbops": 0.3}
DELETE = object()


def make(costs=COSTS, bits=BITS):
    return policy.make_policy(costs, bits, **FACTS)


def changed(*keys, to, policy_made=None):
    """Returns a policy as JSON with the entry at `keys` changed or deleted."""
    tree = json.loads(json.dumps((policy_made or make()).to_json()))
    parent = tree
    for key in keys[:-1]:
        parent = parent[key]
    if to is DELETE:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = to
    return json.dumps(tree)


def test_content_by_hand():
    gbops = (1_000_000 * 64 + 5_000_000 * 8 + 7_000_000 * 16 + 10_000 * 64) / 1e9
    assert make().to_json() == {
        "format": 1, **FACTS, "gbops": pytest.approx(gbops, rel=1e-12),
        "layers": {
            "conv1": {"act_bits": 8, "weight_bits": 8, "macs": 1_000_000},
            "layer1_0/conv1": {"act_bits": 2, "weight_bits": 4, "macs": 5_000_000},
            "layer1_0/conv2": {"act_bits": 4, "weight_bits": 4, "macs": 7_000_000},
            "fc": {"act_bits": 8, "weight_bits": 8, "macs": 10_000},
        },
    }  # fmt: skip


def test_the_file_to_the_byte(tmp_path):
    costs = {path: COSTS[path] for path in ("conv1", "layer1_0/conv1")}
    policy.write_policy(tmp_path / "policy.json", make(costs, BITS))
    assert (
        (tmp_path / "policy.json").read_text()
        == """{
  "format": 1,
  "model": "tiny",
  "image_size": 8,
  "searcher": "metamix",
  "seed": 3,
  "budget_gbops": 0.3,
  "gbops": 0.104,
  "layers": {
    "conv1": {
      "act_bits": 8,
      "weight_bits": 8,
      "macs": 1000000
    },
    "layer1_0/conv1": {
      "act_bits": 2,
      "weight_bits": 4,
      "macs": 5000000
    }
  }
}
"""
    )


def test_its_cost_is_the_budgets_and_nothing_of_it_can_be_set():
    made = make()
    for unit, expected in (("gbops", made.gbops), ("average_act_bits", 3.0)):
        budget = make_budget(COSTS, expected, unit)
        assert made.cost(budget) == budget.cost(BITS) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.gbops = 0.0


def test_content_of_pairs_by_hand():
    gbops = (1_000_000 * 64 + 5_000_000 * 16 + 7_000_000 * 16 + 10_000 * 64) / 1e9
    made = make(PAIR_COSTS, PAIR_BITS)
    assert made.gbops == pytest.approx(gbops, rel=1e-12)
    assert made.to_json()["layers"] == {
        "conv1": {"act_bits": 8, "weight_bits": 8, "macs": 1_000_000},
        "layer1_0/conv1": {"act_bits": 2, "weight_bits": 8, "macs": 5_000_000},
        "layer1_0/conv2": {"act_bits": 8, "weight_bits": 2, "macs": 7_000_000},
        "fc": {"act_bits": 8, "weight_bits": 8, "macs": 10_000},
    }


@pytest.mark.parametrize(
    ("costs", "bits"), [(COSTS, BITS), (PAIR_COSTS, PAIR_BITS)], ids=["activations", "pairs"]
)
def test_round_trip(costs, bits, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text("what was there before")
    made = make(costs, bits)
    policy.write_policy(path, made)
    read = policy.read_policy(path, costs)
    assert read == made
    assert list(read.layers) == list(costs)
    assert read.bits == bits
    assert all(isinstance(pair, Bits) for pair in read.bits.values())
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy.json"]


@pytest.mark.parametrize(
    ("costs", "bits", "first", "second"),
    [
        (COSTS, BITS, 2, 1),
        (PAIR_COSTS, PAIR_BITS, 6, 2),  # all weight bits at 8, at 4, at 2 activation bits
        (costs_of((4,), (8, 2)), {path: Bits(4, 2) for path in COSTS} | ENDS, 1, 1),
    ],
    ids=["activations", "pairs", "weights"],
)
def test_branches_are_indices_of_the_searched_layers(costs, bits, first, second):
    branches = make(costs, bits).branches(costs)
    assert {path: int(index) for path, index in branches.items()} == {
        "layer1_0/conv1": first,
        "layer1_0/conv2": second,
    }
    assert {str(index.dtype) for index in branches.values()} == {"int32"}


def test_every_candidate_is_the_branch_that_it_is_listed_as():
    path = "layer1_0/conv1"
    for number, pair in enumerate(PAIR_COSTS[path].candidates):
        assert policy.branches(PAIR_BITS | {path: pair}, PAIR_COSTS)[path] == number


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a readable policy file"),
        ("{", "not a readable policy file"),
        ("\xff\xfe".encode("latin1"), "not a readable policy file"),
        ("[]", "expected a policy of format 1"),
        ("null", "expected a policy of format 1"),
        (changed("format", to=2), "expected a policy of format 1"),
        (changed("format", to=DELETE), "expected a policy of format 1"),
        (changed("layers", to=DELETE), "policy lacks layers"),
        (changed("seed", to=DELETE), "policy lacks seed"),
        (changed("layers", to=[]), "policy lacks a table of layers"),
        (
            changed("layers", "layer1_0/conv3", to={"act_bits": 4, "weight_bits": 4, "macs": 1}),
            "unknown layer 'layer1_0/conv3'; did you mean 'layer1_0/conv2'?",
        ),
        (changed("layers", "fcc", to={}), "unknown layer 'fcc'; did you mean 'fc'?"),
        (changed("layers", "head\nend", to={}), "unknown layer 'head\\nend'; known: conv1, fc,"),
        (changed("layers", "layer1_0/conv1", to=DELETE), "layer 'layer1_0/conv1' of the network"),
        (changed("layers", "fc", to=4), "fc: act_bits=None, expected one of (8,)"),
        (changed("layers", "fc", to={}), "fc: act_bits=None, expected one of (8,)"),
        (changed("layers", "fc", "act_bits", to=4), "fc: act_bits=4, expected one of (8,)"),
        (
            changed("layers", "layer1_0/conv2", "act_bits", to=3),
            "layer1_0/conv2: act_bits=3, expected one of (8, 4, 2)",
        ),
        (changed("layers", "layer1_0/conv2", "act_bits", to="4"), "layer1_0/conv2: act_bits='4'"),
        (changed("layers", "layer1_0/conv2", "act_bits", to=[4]), "layer1_0/conv2: act_bits=[4]"),
        (changed("layers", "layer1_0/conv2", "act_bits", to=None), "layer1_0/conv2: act_bits=None"),
        (
            changed("layers", "layer1_0/conv1", "weight_bits", to=8),
            "layer1_0/conv1: weight_bits=8, expected one of (4,)",
        ),
    ],
)
def test_malformed_files_are_one_line_errors(tmp_path, content, message):
    path = tmp_path / "policy.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        policy.read_policy(path, COSTS)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("layer", "value", "message"),
    [
        ("layer1_0/conv1", 3, "layer1_0/conv1: weight_bits=3, expected one of (8, 4, 2)"),
        ("layer1_0/conv2", None, "layer1_0/conv2: weight_bits=None, expected one of (8, 4, 2)"),
        ("layer1_0/conv2", "4", "layer1_0/conv2: weight_bits='4', expected one of (8, 4, 2)"),
        ("layer1_0/conv2", [4], "layer1_0/conv2: weight_bits=[4], expected one of (8, 4, 2)"),
        ("layer1_0/conv2", DELETE, "layer1_0/conv2: weight_bits=None, expected one of (8, 4, 2)"),
        ("conv1", 4, "conv1: weight_bits=4, expected one of (8,)"),
    ],
)
def test_weight_bits_that_are_no_candidates_are_one_line_errors(layer, value, message, tmp_path):
    path = tmp_path / "policy.json"
    made = make(PAIR_COSTS, PAIR_BITS)
    path.write_text(changed("layers", layer, "weight_bits", to=value, policy_made=made))
    with pytest.raises(UserError) as caught:
        policy.read_policy(path, PAIR_COSTS)
    assert str(caught.value) == f"{path}: {message}"


def test_a_policy_of_pairs_does_not_fit_a_network_of_fixed_weights(tmp_path):
    path = tmp_path / "policy.json"
    policy.write_policy(path, make(PAIR_COSTS, PAIR_BITS))
    with pytest.raises(UserError, match=r"layer1_0/conv1: weight_bits=8, expected one of \(4,\)"):
        policy.read_policy(path, COSTS)


@pytest.mark.parametrize("field", ["act_bits", "weight_bits"])
def test_only_candidates_are_accepted(field):
    layer = "layer1_0/conv1"
    for bits in set(range(34)) - set(getattr(COSTS[layer], field)):
        found = policy.Policy.from_json(json.loads(changed("layers", layer, field, to=bits)), "it")
        with pytest.raises(UserError, match=f"it: {layer}: {field}={bits}, expected one of"):
            found.check(COSTS, "it")


def test_missing_files_are_one_line_errors(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(UserError, match="not a readable policy file") as caught:
            policy.read_policy(path, COSTS)
        assert str(path) in str(caught.value)
