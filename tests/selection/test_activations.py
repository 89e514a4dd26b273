"""Activations that are kept at the same time: counted by hand, and limited at every moment."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from metamix_jax.config import default, validate
from metamix_jax.errors import UserError
from metamix_jax.networks import own
from metamix_jax.networks.lifetimes import Moment
from metamix_jax.networks.precision import Bits, LayerCost, QuantSettings
from metamix_jax.selection import cost, knapsack, limits
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost_models import PEAK, activation_models, peak_range, reachable
from metamix_jax.selection.policy import make_policy
from metamix_jax.selection.searchers import metamix, random
from metamix_jax.training import results
from tests.helpers.own_networks import attention

SHAPE = (4, 4, 2)


def moments_of(module):
    settings = QuantSettings(act_bits=(8, 4, 2))
    model = own.make("net", {}, 3, settings, SHAPE, model=module)
    return cost.live_activations(model, SHAPE)


class Residual(nn.Module):
    """Two layers beside a skip connection, with batch norm and hard swish."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm():
            return nn.BatchNorm(use_running_average=not train)

        x = nn.hard_swish(norm()(nn.Conv(6, (3, 3), strides=2, name="stem")(x)))
        y = nn.relu(norm()(nn.Conv(10, (1, 1), name="wide")(x)))
        x = nn.relu(x + norm()(nn.Conv(6, (1, 1), name="narrow")(y)))
        x = nn.Conv(7, (1, 1), name="after")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def test_a_block_with_a_skip_connection():
    image, x, y = 4 * 4 * 2, 2 * 2 * 6, 2 * 2 * 10
    assert moments_of(Residual()) == (
        Moment("stem", {"stem": image}, x),  # x is taken by two
        Moment("wide", {"narrow": y}, x),
        Moment("narrow", {"narrow": y}, 2 * x),  # both sides of the addition
        Moment("after", {"after": x}, 2 * 2 * 7),  # the mean takes it
        Moment("head", {"head": 7}, 3),
    )


class Attending(nn.Module):
    """One product of two inputs."""

    @nn.compact
    def __call__(self, x):
        tokens = x.reshape(x.shape[0], -1, 2)
        queries = nn.Dense(5, name="queries")(tokens)
        keys = nn.Dense(5, name="keys")(tokens[:, :4])
        return nn.Dense(3, name="head")(jax.nn.softmax(attention(queries, keys)).mean(1))


def test_the_second_of_two_inputs_has_no_width_of_its_own():
    queries, keys, scores = 16 * 5, 4 * 5, 16 * 4
    by_layer = {moment.layer: moment for moment in moments_of(Attending())}
    pair = next(name for name in by_layer if "product" in name)
    assert by_layer["keys"] == Moment("keys", {pair: queries, "keys": 4 * 2}, keys)
    assert by_layer[pair] == Moment(pair, {pair: queries}, keys + scores)


class ToItself(nn.Module):
    """A product whose two inputs are the same tensor."""

    @nn.compact
    def __call__(self, x):
        tokens = nn.Dense(5, name="tokens")(x.reshape(x.shape[0], -1, 2))
        scores = jnp.einsum("nqd,nkd->nqk", tokens, tokens)
        return nn.Dense(3, name="head")(jax.nn.softmax(scores).mean(1))


def test_what_is_both_inputs_of_a_product():
    first, pair, _ = moments_of(ToItself())
    assert first == Moment("tokens", {"tokens": 32}, 80)
    assert pair[1:] == ({}, 80 + 16 * 16)


class Shared(nn.Module):
    """A layer that runs three times, its second run on what nothing else takes."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Conv(2, (1, 1), name="layer")
        x = layer(nn.relu(layer(nn.relu(layer(x)))))
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


def test_a_layer_that_runs_again():
    kinds = [(moment.layer, moment.own, moment.rest) for moment in moments_of(Shared())]
    assert kinds == [
        ("layer", {"layer": 64}, 0), ("layer", {"layer": 64}, 0),
        ("layer", {"layer": 32, "head": 32}, 0), ("head", {"head": 32}, 3),
    ]  # fmt: skip


WIDTHS, NAMES = (8, 4, 2), "abc"
COSTS = {
    **{name: LayerCost(5 + 3 * i, 100, 100, WIDTHS, (4,)) for i, name in enumerate(NAMES)},
    "last": LayerCost(3, 10, 10, (8,), (8,)),
}  # fmt: skip
MOMENTS = (
    Moment("a", {"a": 4000, "b": 3000}, 1000),
    Moment("b", {"b": 3000, "c": 6000}, 500),
    Moment("b", {"b": 2000, "c": 6000}, 500),  # never the peak
    Moment("c", {"c": 6000, "last": 900}, 2500),
)
POLICIES = [
    {**{name: Bits(act, 4) for name, act in zip(NAMES, acts, strict=True)}, "last": Bits(8, 8)}
    for acts in itertools.product(WIDTHS, repeat=3)
]


def peak(bits):
    """Returns the peak in MiB, by adding up."""
    found = [8 * m.rest + sum(n * bits[path].act for path, n in m.own.items()) for m in MOMENTS]
    return max(found) / 8 / 2**20


def budget_of(most, value=1.5, *more):
    texts = (f"{PEAK}={most:.17g}", *more)
    options = {"value": value, "unit": "fraction", "limits": texts, "latencies": ""}
    return limits.budget_of(COSTS, ConfigDict(options), moments=lambda: MOMENTS)


def test_the_peak_is_the_greatest_of_the_moments():
    models = activation_models(COSTS, MOMENTS)
    assert len(models) == 3
    for bits in POLICIES:
        assert max(model.cost(bits) for model in models) == pytest.approx(peak(bits), rel=1e-12)
    peaks = sorted(map(peak, POLICIES))
    assert peak_range(models) == pytest.approx((peaks[0], peaks[-1]))
    assert reachable(COSTS, None, MOMENTS)[PEAK] == pytest.approx((peaks[0], peaks[-1]))
    assert PEAK not in reachable(COSTS, None, MOMENTS[:0])


@pytest.mark.parametrize("number", range(0, 27, 2))
def test_the_best_policy_keeps_the_peak(number):
    most, generator = peak(POLICIES[number]), np.random.default_rng(number)
    budget = budget_of(most)
    inside = [bits for bits in POLICIES if peak(bits) <= most * (1 + 1e-9)
              and budget.cost(bits) <= budget.limit]  # fmt: skip
    assert [bits for bits in POLICIES if budget.admits(bits)] == inside
    values = {name: generator.normal(size=3) for name in NAMES}

    def worth(bits):
        return sum(values[name][WIDTHS.index(bits[name].act)] for name in NAMES)

    assert knapsack.best_policy(values, COSTS, budget) == max(inside, key=worth)
    config = ConfigDict({"search": {"least_spent": 0.0}, "seed": 0})
    context = SearchContext(None, COSTS, budget, config, {}, values, None)
    assert metamix.choose(context) in inside and random.choose(context) in inside


def test_a_peak_out_of_reach():
    least = peak_range(activation_models(COSTS, MOMENTS))[0]
    message = rf"limits={PEAK}=.*: this network reaches .* MiB .*nearest feasible value: {least:.6}"
    with pytest.raises(UserError, match=message):
        budget_of(0.9 * least)
    assert budget_of(least).further


def test_the_peak_is_reported_beside_other_limits():
    bits = POLICIES[4]
    budget = budget_of(1.1 * peak(bits), 1.9, "average_act_bits=7")
    facts = {"model": "m", "image_size": 4, "searcher": "random", "seed": 0, "budget_gbops": 1.0}
    policy = make_policy(COSTS, bits, **facts)
    texts = (f"{PEAK}={1.1 * peak(bits):.17g}", "average_act_bits=7")
    options = ConfigDict({"value": 1.9, "unit": "fraction", "limits": texts})
    first, second = results._budget(options, budget, policy)["limits"]
    assert first["cost"] == pytest.approx(peak(bits)) and "at the peak" in first["asked"]
    assert first["limit"] == pytest.approx(1.1 * peak(bits))
    assert second["unit"] == "average bits" and second["limit"] == 7


def test_it_is_a_limit_and_needs_several_widths():
    config = default()
    config.model, config.data.name = ConfigDict({"name": "resnet18"}), "cifar10"
    config.budget.limits = (f"{PEAK}=1.0",)
    validate(config)
    config.quant.act_bits, config.quant.weight_bits = (4,), (8, 4)
    with pytest.raises(UserError, match="quant.act_bits.*two or more with a limit on"):
        validate(config)
    config.quant.act_bits = (8, 4)
    config.budget.unit = PEAK
    with pytest.raises(UserError, match=r"budget.unit='activation_mebibytes'"):
        validate(config)


def test_nothing_is_computed():
    """Counting needs shapes alone: an image far larger than memory."""
    model = own.make("net", {}, 3, QuantSettings(act_bits=(8, 4)), (40000, 40000, 2),
                     model=Shared())  # fmt: skip
    found = cost.live_activations(model, (40000, 40000, 2))
    assert found[0].own["layer"] == 2 * 40000 * 40000 * 2
