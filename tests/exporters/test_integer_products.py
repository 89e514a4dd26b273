"""The ONNX files of general networks for integer kernels: what runs, and what it computes."""

import dataclasses
import functools

import numpy as np
import pytest

from metamix_jax.exporters import executor, integer_products, integer_runtime
from metamix_jax.exporters.graph import IMAGE, Graph, Kernel, Node, Quantizer, normalise
from metamix_jax.exporters.integer_plan import HIGHEST, fold
from metamix_jax.networks import own
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.networks.zoo.vit import VisionTransformer
from tests.helpers.export_networks import CLASSES, calibrated, graph_of, intercepted, random_images

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SHAPE = (9, 9, 1)
PIXELS = np.random.default_rng(0).integers(0, 256, (24, *SHAPE), np.uint8)


@functools.cache
def network(name, **fields):
    settings = QuantSettings(**({"act_bits": (8, 5), "weight_bits": (8, 4)} | fields))
    return graph_of(calibrated(intercepted(name, settings, SHAPE), random_images(SHAPE)))


def transformer(shape=(8, 8, 1), **fields):
    model = VisionTransformer(CLASSES, patch_size=2, width=16, depth=1, heads=2)
    settings = QuantSettings(act_bits=(8, 4), weight_bits=(4,), **fields)
    made = own.make("vit", {}, CLASSES, settings, shape, model=model)
    return graph_of(calibrated(made, random_images(shape)))


def tensors(content, names, graph, pixels):
    """Returns tensors of a model by name."""
    model = onnx.load_from_string(content)
    del model.graph.output[:]
    infos = [onnx.helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, None) for x in names]
    model.graph.output.extend(infos)
    images = integer_runtime.channels_first(normalise(pixels, graph))
    found = integer_runtime.session(model.SerializeToString()).run(None, {IMAGE: images})
    return dict(zip(names, found, strict=True))


def scores(content, graph, pixels):
    return tensors(content, ["scores"], graph, pixels)["scores"]


@pytest.mark.parametrize("name", ["Net", "NnxNet", "Everything"])
def test_every_product_is_an_integer_kernel(name):
    graph = network(name)
    for content in integer_runtime.integer_files(graph, PIXELS):
        found = integer_runtime.kernels(content)
        kernels = ("MatMulIntegerToFloat", "QLinearConv", "QLinearMatMul", "QGemm")
        integer = sum(found.get(op, 0) for op in kernels)
        assert integer == len(graph.layers) + sum(node.op == "product" for node in graph.nodes)
        assert (
            not {"MatMul", "FusedMatMul", "Conv", "Gemm"} & integer_runtime.in_float(found).keys()
        )


def test_a_transformer_computes_what_the_bundle_does():
    graph = transformer()
    assert integer_products.convolutions(graph) == ()  # its patches are rows of a matrix
    pixels = np.random.default_rng(1).integers(0, 256, (32, 8, 8, 1), np.uint8)
    plain, packed = integer_runtime.integer_files(graph, pixels)
    found = scores(plain, graph, pixels)
    apart = np.abs(found - executor.run(graph, normalise(pixels, graph))).max(axis=-1)
    last = graph.layers[-1]
    bias = last.quantizer.step * last.kernel.step.max()  # rounded to multiples of this
    # Most images; in others a value lies between two levels.
    assert np.median(apart) < 0.51 * bias < 0.1 * found.std()
    np.testing.assert_array_equal(scores(packed, graph, pixels), found)


@pytest.mark.parametrize("name", ["Net", "NnxNet"])
def test_results_of_convolutions_are_rounded_to_8_bits(name):
    graph = network(name)
    content, _ = integer_runtime.integer_files(graph, PIXELS)
    names = integer_products.convolutions(graph)
    ranges = integer_runtime._ranges(graph, names, normalise(PIXELS, graph))
    first, *_ = names
    inputs = {step.output: step.node for step in fold(graph.nodes)}
    node = inputs[first]
    assert node.inputs == (IMAGE,)
    levels = executor.quantize(normalise(PIXELS, graph), node.quantizer)
    sums = executor.integer_product(node, levels)
    wanted = executor.real_output(node, sums, SHAPE)
    least, most = min(ranges[first][0], 0.0), max(ranges[first][1], 0.0)
    wanted = np.maximum(wanted, 0) if name == "NnxNet" else wanted  # the ReLU behind it
    step = (most - least) / HIGHEST
    found = tensors(content, [first], graph, PIXELS)[first]
    bias = node.quantizer.step * node.kernel.step.max()  # rounded to multiples of this
    assert np.abs(found - wanted).max() < 0.51 * (step + bias)
    assert len(np.unique(found)) > 100
    close = np.abs(scores(content, graph, PIXELS) - executor.run(graph, normalise(PIXELS, graph)))
    assert close.mean() < 0.2 * scores(content, graph, PIXELS).std()


@pytest.mark.parametrize("make", [transformer, lambda **fields: network("Net", **fields)])
def test_an_image_that_is_not_quantized(make):
    graph = make(image_bits=32)
    assert graph.layers[0].quantizer is None
    pixels = np.random.default_rng(1).integers(0, 256, (8, *graph.image_shape), np.uint8)
    found = scores(integer_runtime.integer_files(graph, pixels)[0], graph, pixels)
    wanted = executor.run(graph, normalise(pixels, graph))
    assert np.abs(found - wanted).mean() < 0.1 * wanted.std()


KERNEL = np.random.default_rng(0).integers(-7, 8, (2, 2, 2, 3)).astype(np.int8)


def layered(op, quantizer, *, size=2, stride=2, after=(), bias=None, shape=(4, 6, 2)):
    """A layer of a given input, and softmax, which makes the network a general one."""
    kernel = Kernel(4, KERNEL[:size, :size], np.float32([0.1, 0.2, 0.05]))
    if op == "dense":
        kernel = dataclasses.replace(kernel, levels=KERNEL[0, 0])
    sides = (shape[0] - size) // stride + 1, (shape[1] - size) // stride + 1
    rows = shape[:2] if op == "dense" else sides
    options = {} if op == "dense" else {"stride": stride, "groups": 1, "padding": ((0, 0), (0, 0))}
    arrays = {} if bias is None else {"bias": np.float32(bias)}
    nodes = [Node(op, "layer", (IMAGE,), (*rows, 3), options, arrays, quantizer, kernel)]
    for each in after:
        nodes.append(Node(each, each, (nodes[-1].name,), (*rows, 3)))
    nodes += [
        Node("mean", "mean", (nodes[-1].name,), (1, 1, 3)),
        Node("flatten", "flat", ("mean",), (3,)),
        Node("softmax", "shares", ("flat",), (3,)),
    ]  # fmt: skip
    return Graph("layered", shape, 3, (0.5,), (0.25,), {}, tuple(nodes))


@pytest.mark.parametrize("op", ["dense", "conv"])
@pytest.mark.parametrize("after", [(), ("relu",), ("relu6",)])
@pytest.mark.parametrize(
    "quantizer",
    [Quantizer(4, True, 0.2, 0.0), Quantizer(3, False, 0.3, 0.0), Quantizer(4, False, 0.25, 1.7)],
)
def test_a_layer_over_positions_or_patches_is_exact(op, after, quantizer):
    graph = layered(op, quantizer, after=after, bias=(0.5, -3.0, 4.0))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 2), np.uint8)
    assert integer_products.convolutions(graph) == ()
    content = integer_products.products_model(graph, {})
    name = ("layer", *after)[-1]
    found = tensors(content, [name], graph, pixels)[name]
    node, images = graph.nodes[0], normalise(pixels, graph)
    levels = executor.quantize(images, node.quantizer)
    wanted = executor.real_output(node, executor.integer_product(node, levels), graph.image_shape)
    if after:
        wanted = np.clip(wanted, 0, 6 if after == ("relu6",) else None)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(
        scores(content, graph, pixels), executor.run(graph, images), atol=1e-5
    )


@pytest.mark.parametrize(
    ("fields", "ranged"),
    [
        ({}, False),
        ({"size": 1, "stride": 1}, False),
        ({"size": 1}, True),  # leaves positions out
        ({"stride": 1}, True),  # overlapping patches
        ({"shape": (4, 7, 2)}, True),  # a column is left over
    ],
)
def test_which_convolutions_are_matrices(fields, ranged):
    graph = layered("conv", Quantizer(4, True, 0.2, 0.0), **fields)
    assert integer_products.convolutions(graph) == (("layer",) if ranged else ())
    pixels = np.random.default_rng(0).integers(0, 256, (5, *graph.image_shape), np.uint8)
    found = scores(integer_runtime.integer_files(graph, pixels)[0], graph, pixels)
    wanted = executor.run(graph, normalise(pixels, graph))
    np.testing.assert_allclose(found, wanted, atol=2e-2 if ranged else 1e-5)


@pytest.mark.parametrize("bound", ["relu", "relu6"])
def test_a_rectified_sum_stays_in_float(bound):
    nodes = (
        Node("reshape", "rows", (IMAGE,), (9, 1), {"shape": (9, 1)}),
        Node("multiply", "squares", ("rows", "rows"), (9, 1)),
        Node("add", "sum", ("rows", "squares"), (9, 1)),
        Node(bound, "bounded", ("sum",), (9, 1)),
        Node("flatten", "flat", ("bounded",), (9,)),
    )
    graph = Graph("sum", (3, 3, 1), 9, (0.5,), (0.2,), {}, nodes)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 1), np.uint8)
    pixels[0] = 100  # where the sum is below 0
    content = integer_products.products_model(graph, {})
    wanted = executor.run(graph, normalise(pixels, graph))
    assert wanted.min() == 0 and (wanted.max() == 6) == (bound == "relu6")
    np.testing.assert_allclose(scores(content, graph, pixels), wanted, atol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_product_multiplies_levels(shift):
    first, second = Quantizer(4, True, 0.2, 0.0), Quantizer(3, False, 0.3, shift)
    nodes = (
        Node("transpose", "turned", (IMAGE,), (3, 3, 1), {"order": (2, 1, 3)}),
        Node("reshape", "left", (IMAGE,), (3, 3), {"shape": (3, 3)}),
        Node("reshape", "right", ("turned",), (3, 3), {"shape": (3, 3)}),
        Node("product", "product", ("left", "right"), (3, 3), quantizer=first, other=second),
        Node("sum", "sums", ("product",), (3,), {"axes": (0,)}),
    )
    graph = Graph("product", (3, 3, 1), 3, (0.5,), (0.25,), {}, nodes)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 1), np.uint8)
    content = integer_products.products_model(graph, {})
    wanted = executor.run(graph, normalise(pixels, graph))
    np.testing.assert_allclose(scores(content, graph, pixels), wanted, atol=1e-5)
    if not shift:
        assert "MatMulIntegerToFloat" in integer_runtime.kernels(content)
