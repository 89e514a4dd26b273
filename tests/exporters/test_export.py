"""The exported graph and its NumPy executor against the network in JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from benchmarks import export_forms
from metamix_jax.data import batching
from metamix_jax.exporters import executor, onnx_files
from metamix_jax.exporters.graph import IMAGE, Graph, Kernel, Node, Quantizer, normalise
from metamix_jax.exporters.lowering import lower
from metamix_jax.exporters.packing import pack, packed_size, unpack
from metamix_jax.exporters.recognise import recognised
from metamix_jax.exporters.stablehlo import PLATFORMS, stablehlo
from metamix_jax.networks import registry
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.networks.quantizers import fake_quant
from tests.helpers.export_networks import (
    CLASSES,
    calibrated,
    graph_of,
    intercepted,
    pieces,
    quantized,
    random_images,
)
from tests.helpers.tiny_network import compiled

ALL_BITS = tuple(range(2, 9))
SHAPE = (11, 9, 3)  # odd sides, where the paddings differ most


# Packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ALL_BITS)
def test_packing_and_unpacking_give_back_every_level(bits):
    levels = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.int8)
    for shape in ((2**bits,), (1, 2, 2 ** (bits - 1)), (2**bits - 1,), (1,), (0,)):
        wanted = levels[: int(np.prod(shape))].reshape(shape)
        packed = pack(wanted, bits)
        assert len(packed) == packed_size(wanted.size, bits) == -(-wanted.size * bits // 8)
        found = unpack(packed, bits, shape)
        assert found.dtype == np.int8 and np.array_equal(found, wanted)


def test_the_bit_order_is_the_documented_one():
    # The 3-bit levels 1, -2, 3 are 001, 110, 011, the first in the lowest bits.
    assert pack(np.int8([1, -2, 3]), 3) == bytes([0b11110001, 0b00000000])
    assert pack(np.int8([1, -2, 3, -4]), 4) == bytes([0xE1, 0xC3])
    assert pack(np.int8([-1, 0, 1, -2]), 2) == bytes([0b10010011])
    assert pack(np.int8([-127, 127]), 8) == bytes([0x81, 0x7F])


def test_bytes_that_are_no_packed_levels():
    with pytest.raises(ValueError, match="expected 2 for 3 levels of 3 bits"):
        unpack(b"\0", 3, (3,))
    with pytest.raises(ValueError, match="zeros after the last level"):
        unpack(b"\0\x80", 3, (3,))
    with pytest.raises(AssertionError):
        pack(np.int8([4]), 3)


# The executor against JAX ----------------------------------------------------------------------


def assert_equal_to_jax(network, images):
    """Asserts equal levels, except for ties, and scores in the executor, onnxruntime and qonnx."""
    for package in ("onnxruntime", "qonnx"):
        pytest.importorskip(package)
    graph = graph_of(network)
    qcdq, qonnx, forced = (
        onnx_files.qcdq_model(graph), onnx_files.qonnx_model(graph), export_forms.FORCED,
    )  # fmt: skip
    forms = {
        f"numpy{forced}": export_forms.numpy_form(graph),
        f"onnxruntime{forced}": export_forms.onnxruntime_form_by_layer(qcdq, graph),
        f"qonnx{forced}": export_forms.qonnx_form(qonnx, graph, by_layer=True),
        "numpy": export_forms.numpy_form(graph),
        "onnxruntime": export_forms.onnxruntime_form(qcdq, graph),
        "qonnx": export_forms.qonnx_form(qonnx, graph),
    }
    limits = {name: (form, len(images)) for name, form in forms.items()}
    reference, outcomes = export_forms.compare(network, graph, images, limits)
    expected = len(images) * sum(np.prod(graph.shape_of(node.inputs[0])) for node in graph.layers)
    for name, (levels, scores, _) in outcomes.items():
        assert (levels.compared, levels.errors) == (expected, 0), name
        assert levels.ties <= 1e-4 * levels.compared, name
        alike = ~levels.parted
        np.testing.assert_allclose(scores[alike], reference[alike], atol=1e-4, err_msg=name)


def random_network(seed):
    """Returns `Pieces` at random bits; four seeds cover all paddings and strides."""
    generator = np.random.default_rng(seed)
    act_bits, weight_bits = (
        tuple(int(bits) for bits in generator.choice(ALL_BITS, count, replace=False))
        for count in (4, 3)
    )
    settings = QuantSettings(
        act_bits=act_bits,
        weight_bits=weight_bits,
        first_last_bits=int(generator.choice(ALL_BITS)),
        positive_step=("floor", "abs", "softplus")[generator.integers(3)],
    )
    padding, stride = ("torch", "tf")[seed % 2], 1 + seed // 2 % 2
    kernel_size = (3, 5)[seed // 2 % 2]
    model = pieces(settings, SHAPE, padding=padding, stride=stride, kernel_size=kernel_size)
    return quantized(model, SHAPE, seed=seed)


RANDOM_NETWORKS = 4


@pytest.mark.parametrize("seed", range(RANDOM_NETWORKS))
@pytest.mark.filterwarnings("default")  # for qonnx
def test_random_networks_in_every_form(seed):
    network = random_network(seed)
    assert_equal_to_jax(network, random_images(network.network.image_shape, seed=seed))


def test_random_networks_have_all_bits():
    policies = [random_network(seed).policy.bits.values() for seed in range(RANDOM_NETWORKS)]
    for kind in ("act", "weight"):
        assert {getattr(pair, kind) for pairs in policies for pair in pairs} == set(ALL_BITS)


@pytest.mark.parametrize("shortcut", ["identity", "conv"])
@pytest.mark.filterwarnings("default")  # for qonnx
def test_cifar_resnets(shortcut):
    fields = {"name": "cifar_resnet", "depth": 8, "width": 4, "shortcut": shortcut}
    settings = QuantSettings(act_bits=(8, 4, 2), weight_bits=(8, 4, 2))
    model = registry.make(ConfigDict(fields), CLASSES, settings, (10, 10, 1))
    assert_equal_to_jax(quantized(model, (10, 10, 1)), random_images((10, 10, 1)))


@pytest.mark.parametrize("name", ["Deployed", "Net", "Everything", "pieces"])
def test_recognised_operations_compute_the_same(name):
    settings = QuantSettings(act_bits=(8, 4), weight_bits=(8, 4))
    model = pieces(settings, SHAPE) if name == "pieces" else intercepted(name, settings, SHAPE)
    network, images = calibrated(model, random_images(SHAPE)), random_images(SHAPE, seed=2)
    raw = lower(model, network.variables, network.policy.bits, SHAPE)
    graph, found = graph_of(network), recognised(raw, SHAPE)
    assert graph.general == (name in ("Net", "Everything")) and len(found) < len(raw)
    whole, steps = (dataclasses.replace(graph, nodes=nodes) for nodes in (found, raw))
    np.testing.assert_allclose(executor.run(whole, images), executor.run(steps, images), atol=1e-5)


def test_a_chain_that_is_used_in_the_middle_stays_in_pieces():
    shape, scale = (3, 2, 2), {"shape": (2,)}
    nodes = (
        Node("constant", "c", (), (2,), scale, {"value": np.float32([2, 3])}),
        Node("multiply", "a", (IMAGE, "c"), shape),
        Node("multiply", "b", ("a", "c"), shape),
        Node("add", "sum", ("a", "b"), shape),
    )
    graph = Graph("chain", shape, 2, (0.0,), (1.0,), {}, nodes)
    found = dataclasses.replace(graph, nodes=recognised(nodes, shape))
    assert [node.op for node in found.nodes] == ["affine", "affine", "add"]
    images = random_images(shape)
    np.testing.assert_allclose(executor.run(found, images), executor.run(graph, images), rtol=1e-6)


def test_weights_on_rounding_boundaries_are_rounded_as_in_jax():
    model = pieces(QuantSettings(act_bits=(8, 4), weight_bits=(8,)), SHAPE)
    network = quantized(model, SHAPE)
    generator = np.random.default_rng(0)
    for path in network.network.costs:
        leaves = network.variables["params"][path]
        step = network.variables["quant"][path]["weight_step"][0]
        places = generator.integers(-127, 127, leaves["kernel"].shape) + np.float32(0.5)
        leaves["kernel"] = np.float32(places * step)
    for node in graph_of(network).layers:
        kernel = network.variables["params"][node.name]["kernel"]
        real = jax.jit(fake_quant, static_argnums=2, static_argnames="signed")(
            kernel, node.kernel.step, 8, signed=True
        )
        assert np.array_equal(np.rint(np.asarray(real) / node.kernel.step), node.kernel.levels)


def test_an_image_that_is_not_quantized():
    settings = QuantSettings(act_bits=(8, 4), weight_bits=(4,), image_bits=32)
    network = quantized(pieces(settings, SHAPE), SHAPE)
    graph = graph_of(network)
    assert graph.layers[0].quantizer is None
    images = random_images(SHAPE)
    scores = compiled(network.network.model.apply)(
        network.variables, images, precision=network.precision
    )
    np.testing.assert_allclose(executor.run(graph, images), scores, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        ("resnet18", "torch"),
        pytest.param("resnet50", "tf", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", "tf", marks=pytest.mark.slow),
        ("mobilenet_v3_small", "torch"),  # large has the same code
    ],
)
def test_networks_of_the_zoo_have_all_of_their_layers_and_few_operations(name, padding):
    # Scores are compared on real networks (benchmarks/export_parity.py) and on `Pieces` above.
    fields, shape = ConfigDict({"name": name, "padding": padding}), (33, 33, 3)
    network = quantized(registry.make(fields, CLASSES, QuantSettings(), shape), shape)
    graph = graph_of(network)
    assert {node.name for node in graph.layers} == set(network.network.costs)
    assert not graph.general
    norms = flatten_dict(network.variables["batch_stats"], sep="/")
    assert sum(node.op == "affine" for node in graph.nodes) == len(norms) / 2
    costs = {
        node.name: int(np.prod(node.shape[:-1])) * node.kernel.levels.size for node in graph.layers
    }
    assert costs == {path: cost.macs for path, cost in network.network.costs.items()}
    assert executor.run(graph, random_images(shape, count=1)).shape == (1, CLASSES)


# What the executor promises --------------------------------------------------------------------


def make_dense(levels, high_bits=8):
    kernel = Kernel(8, np.asarray(levels, np.int8), np.ones(np.shape(levels)[1], np.float32))
    quantizer = Quantizer(high_bits, signed=False, step=1.0, shift=0.0)
    return Node("dense", "fc", ("image",), (kernel.step.size,), quantizer=quantizer, kernel=kernel)


def test_accumulators_are_exact_where_float32_is_not():
    # 1000 * 255 * 127 + 1 is odd and above 2^24.
    node = make_dense([[127]] * 1000 + [[1]])
    levels = np.full((1, 1001), 255, np.int32)
    levels[0, -1] = 1
    found = executor.integer_product(node, levels)
    assert found.dtype == np.int32 and found[0, 0] == 1000 * 255 * 127 + 1


def test_accumulators_beyond_32_bits_are_refused():
    node = make_dense(np.full((70000, 1), 127))
    with pytest.raises(AssertionError, match="do not fit 32 bits"):
        executor.integer_product(node, np.zeros((1, 70000), np.int32))


def test_quantizing_rounds_half_to_even_and_clips():
    quantizer = Quantizer(3, signed=False, step=0.5, shift=0.25)
    x = np.float32([-9, -0.25, 0.0, 0.5, 1.0, 9])
    assert executor.quantize(x, quantizer).tolist() == [0, 0, 0, 2, 2, 7]
    assert executor.quantize(x, Quantizer(3, True, 0.5, 0.0)).tolist() == [-3, 0, 0, 1, 2, 3]


def test_normalised_as_in_training():
    network = quantized(pieces(QuantSettings(), SHAPE), SHAPE)
    graph = graph_of(network)
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    expected = compiled(lambda p: batching.preprocess(p, mean=graph.mean, std=graph.std))(pixels)
    # XLA replaces division by a constant with multiplication by its reciprocal.
    np.testing.assert_array_max_ulp(normalise(pixels, graph), np.asarray(expected), maxulp=2)


# StableHLO -------------------------------------------------------------------------------------


def test_stablehlo_takes_any_batch_and_three_platforms():
    from jax import export

    network = quantized(pieces(QuantSettings(), SHAPE), SHAPE)
    model, variables, precision = network.network.model, network.variables, network.precision
    exported = export.deserialize(bytearray(stablehlo(model, variables, precision, SHAPE)))
    assert exported.platforms == PLATFORMS == ("cpu", "cuda", "tpu")
    images = random_images(SHAPE, count=4)
    scores = jax.jit(lambda x: model.apply(variables, x, precision=precision))(images)
    for count in (1, 4):
        found = exported.call(jnp.asarray(images[:count]))
        np.testing.assert_allclose(found, scores[:count], atol=1e-5)
