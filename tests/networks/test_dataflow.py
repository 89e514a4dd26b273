"""Bounds of traced values, against the functions' least and greatest values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from metamix_jax.networks import dataflow
from metamix_jax.networks.dataflow import Value

SHAPE = (2, 8, 8, 4)
INFINITE = math.inf


def value_of(function, *arguments):
    """Returns what is known of a function's result, given what is known of its arguments."""
    arguments = arguments or (Value(image=True),)
    closed = jax.make_jaxpr(function)(*(jnp.zeros(SHAPE) for _ in arguments))
    (found,) = dataflow.walk(closed.jaxpr, closed.consts, arguments, lambda *_: None)
    return found


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [
        (lambda x: x, -INFINITE, INFINITE),
        (nn.relu, 0, INFINITE),
        (nn.relu6, 0, 6),
        (nn.hard_swish, -3 / 8, INFINITE),
        (nn.silu, -0.278464543, INFINITE),
        (lambda x: x * jax.nn.sigmoid(x), -0.278464543, INFINITE),
        (lambda x: nn.silu(1000 * x), -0.278464543, INFINITE),  # turns close to 0
        (lambda x: nn.relu(x) / jnp.sqrt(jnp.float32(64)), 0, INFINITE),
        (nn.gelu, -0.170040733, INFINITE),
        (lambda x: nn.gelu(x, approximate=False), -0.169971252, INFINITE),
        (nn.elu, -1, INFINITE),
        (nn.leaky_relu, -INFINITE, INFINITE),
        (nn.tanh, -1, 1),
        (nn.sigmoid, 0, 1),
        (nn.hard_sigmoid, 0, 1),
        (nn.softplus, 0, INFINITE),
        (jnp.square, 0, INFINITE),
        (lambda x: -x * x, -INFINITE, 0),
        (lambda x: 3 - nn.relu6(x) / 2, 0, 3),
        (jnp.abs, 0, INFINITE),
        # Several values, and operations between positions: interval arithmetic.
        (lambda x: nn.relu(x) + nn.silu(x[:, ::-1]), -0.278464543, INFINITE),
        (lambda x: nn.relu6(x).mean((1, 2)), 0, 6),
        (lambda x: nn.silu(x).mean((1, 2)), -0.278464543, INFINITE),
        (lambda x: nn.max_pool(nn.relu6(x), (2, 2), (2, 2)), 0, 6),
        (lambda x: nn.avg_pool(nn.relu6(x), (2, 2), (2, 2)), 0, 6),
        (nn.softmax, 0, INFINITE),
        (lambda x: jnp.concatenate([nn.relu(x), nn.tanh(x)], axis=-1), -1, INFINITE),
        (lambda x: jnp.pad(nn.sigmoid(x) + 1, ((0, 0), (1, 1), (1, 1), (0, 0))), 0, 2),
        (lambda x: (nn.relu(x).transpose(0, 3, 1, 2).reshape(2, -1)), 0, INFINITE),
        (lambda x: nn.relu(x) * nn.sigmoid(x.mean((1, 2), keepdims=True)), 0, INFINITE),
        (lambda x: nn.sigmoid(x) - nn.sigmoid(x[:, ::-1]), -1, 1),
        (lambda x: x + nn.relu(x[:, ::-1]), -INFINITE, INFINITE),
    ],
)  # fmt: skip
def test_bounds(function, low, high):
    found = value_of(function).bounds
    # The grid is not as fine as the functions: the least of SiLU is met to 1e-6.
    np.testing.assert_allclose(found, (low, high), atol=2e-6)
    samples = np.asarray(function(20 * jax.random.normal(jax.random.key(0), SHAPE)))
    assert samples.min() >= found[0] - 2e-6 and samples.max() <= found[1] + 2e-6


def test_hswish_is_bounded_exactly():
    """By the shift that quantizers of its output have."""
    assert value_of(nn.hard_swish).bounds[0] == -0.375


def test_what_a_value_depends_on():
    image = Value(image=True, below=frozenset({"stem"}))
    kernel = Value(weights=frozenset({"conv/kernel"}))
    both = value_of(lambda x, k: jnp.exp(x) + k.mean(), image, kernel)
    assert (both.image, both.weights, both.below) == (True, {"conv/kernel"}, {"stem"})
    alone = value_of(lambda x, k: k / jnp.linalg.norm(k), image, kernel)
    assert (alone.image, alone.weights) == (False, {"conv/kernel"})


def test_visits_may_say_what_is_known():
    closed = jax.make_jaxpr(lambda x: nn.relu(jnp.sin(x)) - 1)(jnp.zeros(SHAPE))

    def visit(eqn, operands):
        return [Value((-0.5, 0.5))] if eqn.primitive.name == "sin" else None

    (found,) = dataflow.walk(closed.jaxpr, closed.consts, [Value()], visit)
    np.testing.assert_allclose(found.bounds, (-1, -0.5))
