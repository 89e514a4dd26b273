"""OMPQ with size budgets, against a linear programming solver, all roundings, published sizes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy.optimize import linprog

from metamix_jax.networks.precision import Bits, QuantSettings
from metamix_jax.selection import cost
from metamix_jax.selection.searchers import ompq
from tests.helpers import zoo


def random_program(seed, layers=5):
    rng = np.random.default_rng(seed)
    worths = np.exp(rng.normal(0, 2, layers))
    sizes = rng.uniform(0.1, 3, layers)
    room = sizes.sum() * rng.uniform(2, 8)
    return worths, sizes, room


@pytest.mark.parametrize("seed", range(20))
def test_continuous_bits_are_the_linear_programs_optimum(seed):
    worths, sizes, room = random_program(seed)
    bits = ompq.continuous_bits(worths, sizes, (2, 8), room)
    solved = linprog(-worths, A_ub=sizes[None], b_ub=[room], bounds=(2, 8))
    assert worths @ bits == pytest.approx(-solved.fun, rel=1e-9)
    assert sizes @ bits == pytest.approx(room, rel=1e-12)
    assert ((bits >= 2) & (bits <= 8)).all()
    assert np.count_nonzero((bits > 2) & (bits < 8)) <= 1


def test_continuous_bits_at_the_ends():
    worths, sizes, _ = random_program(0)
    for room, expected in ((2 * sizes.sum(), 2), (8 * sizes.sum(), 8), (100, 8)):
        bits = ompq.continuous_bits(worths, sizes, (2, 8), room)
        np.testing.assert_allclose(bits, expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("widths", [(8, 7, 6, 5, 4, 3, 2), (2, 4, 8)])
def test_rounding_below_equals_brute_force(seed, widths):
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(0.1, 3, 6)
    bits = rng.uniform(2, 8, 6)
    bits[seed % 6] = 4.0  # already a width, so it stays
    around = [
        {max(w for w in widths if w <= value), min(w for w in widths if w >= value)}
        for value in bits
    ]
    below = [sizes @ picks for picks in itertools.product(*around) if sizes @ picks <= sizes @ bits]
    rounded = ompq.round_below(bits, widths, sizes)
    assert all(width in pair for width, pair in zip(rounded, around, strict=True))
    assert rounded[seed % 6] == 4
    assert sizes @ rounded == pytest.approx(max(below), rel=1e-9)


def test_rounding_to_the_nearest():
    bits = np.array([2.0, 2.9, 3.1, 5.9, 6.1, 8.0, 3.0])
    np.testing.assert_array_equal(ompq.round_nearest(bits, (8, 4, 2)), [2, 2, 4, 4, 8, 8, 2])


def test_shortcuts_go_with_the_layer_before():
    paths = ["a/conv1", "a/conv2", "b/conv1", "b/conv2", "b/downsample_conv", "c"]
    assert ompq.merge_shortcuts(paths, "downsample_conv") == {
        "a/conv1": ["a/conv1"],
        "a/conv2": ["a/conv2"],
        "b/conv1": ["b/conv1"],
        "b/conv2": ["b/conv2", "b/downsample_conv"],
        "c": ["c"],
    }


# Weight bits of ResNet-18's stem, 16 convolutions and classifier; MiB.
PUBLISHED = [
    ("888887888846844448", 6.6986),
    ("434444434422222222", 2.998),
    ("433444444433432223", 3.499),
    ("444444433333432333", 4.000),
    ("433444444433443333", 4.499),
    ("433344434343433444", 5.000),
    ("444444444434444444", 5.500),
]


@pytest.fixture(scope="module")
def resnet18():
    model = zoo.make("resnet18", QuantSettings(weight_bits=(8, 4)), (224, 224, 3), 1000)
    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    shapes = jax.eval_shape(lambda: model.init(keys, jnp.zeros((1, 224, 224, 3))))
    return shapes["params"], cost.layer_costs(model, (224, 224, 3))


def policy_of(digits, costs, act_bits=8):
    """Returns the bits of every layer; shortcuts have those of the preceding convolution."""
    units = ompq.merge_shortcuts(costs, "downsample_conv")
    assert len(units) == len(digits) == 18
    return {
        path: Bits(act_bits, int(digit))
        for unit, digit in zip(units.values(), digits, strict=True)
        for path in unit
    }


@pytest.mark.parametrize(("digits", "size"), PUBLISHED, ids=[str(row[1]) for row in PUBLISHED])
def test_sizes_of_the_published_policies(digits, size, resnet18):
    params, costs = resnet18
    found = ompq.published_size(params, policy_of(digits, costs))
    assert found == pytest.approx(size, abs=6e-4 if size < 6 else 6e-5)


@pytest.mark.parametrize(("act_bits", "gbops"), [(6, 75.104), (8, 97.514)])
def test_bit_operations_of_the_published_policies(act_bits, gbops, resnet18):
    # As published: 5 more operations per output of a convolution, 2 * 512 + 1 per class.
    params, costs = resnet18
    total = 0
    for path, bits in policy_of(PUBLISHED[0][0], costs, act_bits).items():
        kernel = flatten_dict(params, sep="/")[f"{path}/kernel"]
        if path == "fc":
            total += (2 * 512 + 1) * 1000 * 64
            continue
        outputs = costs[path].macs // (kernel.size // kernel.shape[-1])
        act = 8 if path == "conv1" else bits.act
        total += (costs[path].macs + 5 * outputs) * act * bits.weight
    assert total / 1e9 == pytest.approx(gbops, abs=6e-4)
