"""A bundle on integers in JAX: the same sums as the reference executor's."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metamix_jax
from metamix_jax.errors import UserError
from metamix_jax.exporters import bundle, executor, integer_jax
from metamix_jax.exporters.graph import Node, Quantizer, normalise
from metamix_jax.exporters.integer_jax import IntegerNetwork
from metamix_jax.networks.precision import QuantSettings
from tests.helpers.export_networks import (
    calibrated,
    graph_of,
    intercepted,
    pieces,
    random_images,
)
from tests.helpers.tiny_network import compiled

SHAPE = (8, 8, 3)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), np.uint8)
SETTINGS = QuantSettings(act_bits=(8, 5), weight_bits=(8, 4))
NAMES = [
    "pieces", "whole image", "Deployed", pytest.param("Net", marks=pytest.mark.slow), "NnxNet",
    "Everything",
]  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def graph(request):
    name = request.param
    if name == "pieces":
        model = pieces(SETTINGS, SHAPE, padding="tf")
    elif name == "whole image":
        model = pieces(dataclasses.replace(SETTINGS, image_bits=32), SHAPE)
    else:
        shape = (8, 8, 1) if name == "NnxNet" else SHAPE
        model = intercepted(name, SETTINGS, shape)
    shape = (8, 8, 1) if name == "NnxNet" else SHAPE
    images = np.float32(PIXELS[..., : shape[-1]]) / np.float32(255)
    return graph_of(calibrated(model, images))


def pixels_for(graph):
    return PIXELS[..., : graph.image_shape[-1]]


def test_the_sums_are_the_same_integers(graph):
    generator = np.random.default_rng(1)
    for node in graph.layers:
        if node.quantizer is None:
            continue
        low, high = node.quantizer.bounds
        shape = (2, *graph.shape_of(node.inputs[0]))
        levels = generator.integers(low, high + 1, shape, np.int32)
        levels[0] = high  # as far as they go
        kernel = jnp.asarray(node.kernel.levels)
        found = compiled(
            lambda levels, kernel, node=node: integer_jax.integer_product(node, levels, kernel)
        )(levels, kernel)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, executor.integer_product(node, levels), node.name)
    for node in graph.nodes:
        if node.op == "product":
            x, y = (random_images(graph.shape_of(name)) for name in node.inputs)
            wanted = executor.matrix_product(node, x, y)
            found = integer_jax.matrix_product(node, jnp.asarray(x), jnp.asarray(y))
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_scores_are_those_of_the_reference(graph):
    pixels = pixels_for(graph)
    found = IntegerNetwork(graph).scores(pixels)
    wanted = executor.run(graph, normalise(pixels, graph))
    assert found.shape == (5, graph.num_classes) and np.std(wanted, axis=0).min() > 1e-3
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())
    near = np.abs(np.asarray(found) - wanted).max(axis=1) < 1e-4
    assert near.mean() >= 0.6  # of the others, a value was on a rounding boundary


@pytest.mark.parametrize("signed", list(itertools.product([False, True], repeat=2)))
def test_products_of_levels_that_int8_does_not_hold(signed):
    one, other = (Quantizer(8, each, 0.01, 0.0) for each in signed)
    node = Node("product", "product", ("x", "y"), (3, 5), quantizer=one, other=other)
    generator = np.random.default_rng(0)
    x, y = (
        generator.uniform(-1 * s, 2.6, shape).astype(np.float32)
        for s, shape in zip(signed, [(2, 3, 4), (2, 4, 5)], strict=True)
    )
    found = integer_jax.matrix_product(node, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(found, executor.matrix_product(node, x, y), rtol=1e-6)


def test_layers_multiply_bytes(graph):
    """Into 32 bits: what GPUs and TPUs have units for."""
    run = jax.jit(lambda pixels: IntegerNetwork(graph)._scores.func(
        {node.name: jnp.asarray(node.kernel.levels) for node in graph.layers}, pixels
    ))  # fmt: skip
    text = run.lower(pixels_for(graph)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    layers = [node for node in graph.layers if node.quantizer]
    dense = [node for node in layers if node.op == "dense" or node.kernel.levels.shape[2] > 1]
    whole = [line for line in products if line.count("xi8>") == 2 and line.endswith("xi32>")]
    assert len(whole) >= len(dense) > 0


def test_a_bundle_is_loaded_and_a_damaged_one_refused(graph, tmp_path):
    for name, content in bundle.encode(graph).items():
        (tmp_path / name).write_bytes(content)
    network = metamix_jax.load_integer(tmp_path)
    pixels = pixels_for(graph)
    np.testing.assert_array_equal(
        network.scores(pixels), IntegerNetwork(graph).scores(jnp.asarray(pixels))
    )
    assert network.graph.policy == graph.policy
    (tmp_path / bundle.WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match="damaged or not part of a bundle"):
        metamix_jax.load_integer(str(tmp_path))
