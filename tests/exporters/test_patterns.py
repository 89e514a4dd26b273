"""Softmax, GELU and layer norm are found in what Flax computes, and nothing else is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from metamix_jax.exporters import executor, onnx_files
from metamix_jax.exporters.graph import Graph
from metamix_jax.exporters.lowering import lower
from metamix_jax.exporters.patterns import with_patterns
from metamix_jax.exporters.recognise import recognised
from metamix_jax.networks import own
from metamix_jax.networks.precision import QuantSettings
from tests.helpers.export_networks import calibrated, random_images

SHAPE = (3, 4, 6)
IMAGES = random_images(SHAPE, count=3)


class Applied(nn.Module):
    """A function of the image, and the layer that a network needs."""

    function: object
    num_classes: int = 5

    @nn.compact
    def __call__(self, x):
        y = self.function(x)
        y = y.reshape(y.shape[0], -1)
        return nn.Dense(self.num_classes)(y)


@functools.cache
def nodes_of(function):
    """Returns the nodes of `Applied` as they are lowered."""
    model = Applied(function)
    made = own.make("applied", {}, 5, QuantSettings(), SHAPE, model=model)
    network = calibrated(made, IMAGES)
    return lower(made, network.variables, network.policy.bits, SHAPE)


def graph_of(nodes):
    return Graph("applied", SHAPE, 5, (0.0,), (1.0,), {}, tuple(nodes))


def run(nodes):
    return executor.run(graph_of(nodes), IMAGES)


def norm(**fields):
    """A layer norm whose scale and offset, where it has them, differ between channels."""
    keys = [name for name in ("scale", "bias") if fields.get(f"use_{name}", True)]
    count = fields.pop("count", 6)
    params = {key: jnp.linspace(0.5, 2, count) + i for i, key in enumerate(keys)}
    return lambda x: nn.LayerNorm(**fields).apply({"params": params}, x)


def normed(x, count, epsilon, scale=None):
    """Layer norm as Flax computes it, with its constants."""
    mean, squares = (jax.lax.reduce_sum(y, (3,)) / count for y in (x, jax.lax.square(x)))
    variance = jnp.maximum(0.0, squares - jax.lax.square(mean))
    factor = jax.lax.rsqrt(variance[..., None] + epsilon)
    return (x - mean[..., None]) * (factor if scale is None else factor * scale)


LAYER_NORMS = [
    norm(), norm(use_bias=False), norm(use_scale=False), norm(use_scale=False, use_bias=False),
    norm(use_fast_variance=False), norm(use_fast_variance=False, use_bias=False), norm(epsilon=0.5),
    lambda x: norm()(x.mean((1, 2))),  # of features
    lambda x: norm(count=4)(jnp.swapaxes(x, 2, 3)),
    lambda x: normed(x, 6, 1.0),
]  # fmt: skip
FOUND = [
    *((function, "layer_norm") for function in LAYER_NORMS),
    (nn.softmax, "softmax"),
    (lambda x: nn.softmax(x.mean((1, 2))), "softmax"),
    (nn.gelu, "gelu"),
    (lambda x: nn.gelu(x, approximate=False), "gelu"),
    (lambda x: (1 - jax.lax.erf(np.float32(0.5**0.5) * -x)) * (x * 0.5), "gelu"),
]


@pytest.mark.parametrize(("function", "op"), FOUND)
def test_what_is_found_computes_the_same(function, op):
    nodes = nodes_of(function)
    found = recognised(nodes, SHAPE)
    ops = [node.op for node in found]
    assert ops.count(op) == 1 and not {"rsqrt", "exp", "erf", "tanh", "sum"} & set(ops)
    np.testing.assert_allclose(run(found), run(nodes), atol=1e-5)
    (node,) = (node for node in found if node.op == op)
    wanted = np.asarray(jax.jit(function)(IMAGES))
    np.testing.assert_allclose(run(found[: found.index(node) + 1]), wanted, atol=1e-5)


@pytest.mark.parametrize("function", [function for function, _ in FOUND])
def test_what_is_found_is_the_same_in_onnx(function):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    graph = graph_of(recognised(nodes_of(function), SHAPE))
    session = onnxruntime.InferenceSession(onnx_files.qcdq_model(graph))
    (scores,) = session.run(None, {"image": IMAGES.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(scores, executor.run(graph, IMAGES), atol=2e-5)


NOT_FOUND = [
    lambda x: nn.softmax(x, axis=1),
    lambda x: jnp.exp(x - x.max(-1, keepdims=True)) / jnp.exp(x).sum(-1, keepdims=True),
    lambda x: 0.4 * x * (1 - jax.lax.erf(-x * np.float32(0.5**0.5))),
    lambda x: 0.5 * x * (1 - jax.lax.erf(-x * np.float32(0.5))),
    lambda x: 0.5 * x * (1 - jax.lax.erf(-jnp.abs(x) * np.float32(0.5**0.5))),
    lambda x: (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(
        jnp.square(x).mean((1, 3), keepdims=True) + 1
    ),
    lambda x: normed(x, 5, 1.0),  # divides by another number than that of the channels
    lambda x: normed(x, 6, jnp.linspace(0.5, 1, 4).reshape(1, 1, 4, 1)),  # epsilon differs
    lambda x: normed(x, 6, 1.0, scale=2.0),  # the same for all channels
    lambda x: nn.GroupNorm(2).apply({"params": {"scale": jnp.ones(6), "bias": jnp.ones(6)}}, x),
]  # fmt: skip


@pytest.mark.parametrize("function", NOT_FOUND)
def test_what_is_similar_stays_as_it_is(function):
    nodes = nodes_of(function)
    found = recognised(nodes, SHAPE)
    assert not {"softmax", "gelu", "layer_norm"} & {node.op for node in found}
    np.testing.assert_allclose(run(found), run(nodes), atol=1e-5)


def test_a_step_that_is_used_elsewhere_stays():
    def function(x):
        powers = jnp.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True) + powers

    nodes = nodes_of(function)
    found = recognised(nodes, SHAPE)
    assert {"softmax", "exp"} <= {node.op for node in found}
    np.testing.assert_allclose(run(found), run(nodes), atol=1e-6)


def test_names_and_order_stay():
    nodes = nodes_of(norm())
    assert [node.name for node in with_patterns(nodes)] == [node.name for node in nodes]
