import json

import pytest

from metamix_jax import policy
from metamix_jax.errors import UserError
from metamix_jax.layers import LayerCost

COSTS = {
    "conv1": LayerCost(macs=1_000_000, act_elements=64, act_bits=(8,), weight_bits=8),
    "layer1_0/conv1": LayerCost(macs=5_000_000, act_elements=64, act_bits=(8, 4, 2), weight_bits=4),
    "layer1_0/conv2": LayerCost(macs=7_000_000, act_elements=64, act_bits=(8, 4, 2), weight_bits=4),
    "fc": LayerCost(macs=10_000, act_elements=16, act_bits=(8,), weight_bits=8),
}
BITS = {"conv1": 8, "layer1_0/conv1": 2, "layer1_0/conv2": 4, "fc": 8}
FACTS = {"model": "tiny", "image_size": 8, "searcher": "metamix", "seed": 3, "budget_gbops": 0.3}
DELETE = object()


def make():
    return policy.make_policy(COSTS, BITS, **FACTS)


def changed(*keys, to):
    """Returns the policy as JSON with the entry at `keys` changed or deleted."""
    tree = json.loads(json.dumps(make()))
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
    assert make() == {
        "format": 1, **FACTS, "gbops": pytest.approx(gbops, rel=1e-12),
        "layers": {
            "conv1": {"act_bits": 8, "weight_bits": 8, "macs": 1_000_000},
            "layer1_0/conv1": {"act_bits": 2, "weight_bits": 4, "macs": 5_000_000},
            "layer1_0/conv2": {"act_bits": 4, "weight_bits": 4, "macs": 7_000_000},
            "fc": {"act_bits": 8, "weight_bits": 8, "macs": 10_000},
        },
    }  # fmt: skip


def test_round_trip(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text("what was there before")
    policy.write_policy(path, make())
    read = policy.read_policy(path, COSTS)
    assert read == make()
    assert list(read["layers"]) == list(COSTS)
    assert policy.act_bits(read) == BITS
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy.json"]


def test_branches_are_indices_of_the_searched_layers():
    branches = policy.branches(BITS, COSTS)
    assert {path: int(index) for path, index in branches.items()} == {
        "layer1_0/conv1": 2,
        "layer1_0/conv2": 1,
    }
    assert {str(index.dtype) for index in branches.values()} == {"int32"}


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


def test_missing_files_are_one_line_errors(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(UserError, match="not a readable policy file") as caught:
            policy.read_policy(path, COSTS)
        assert str(path) in str(caught.value)
