"""The ONNX files for integer kernels: folding, storage, accuracy, what runs, and their sizes."""

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict

from metamix_jax.exporters import card, executor, integer_plan, integer_runtime, onnx_files
from metamix_jax.exporters.graph import IMAGE, Graph, Kernel, Node, Quantizer, normalise
from metamix_jax.exporters.integer_onnx import integer_model
from metamix_jax.exporters.integer_plan import Storage
from metamix_jax.exporters.recognise import recognised
from metamix_jax.networks import registry
from metamix_jax.networks.precision import QuantSettings
from tests.helpers import export_networks
from tests.helpers.export_networks import (
    CLASSES,
    calibrated,
    graph_of,
    intercepted,
    quantized,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SHAPE = (11, 9, 3)
PIXELS = np.random.default_rng(0).integers(0, 256, (24, *SHAPE), np.uint8)


def settings(act_bits=(8, 7), weight_bits=(8, 7), **fields):
    return QuantSettings(act_bits=act_bits, weight_bits=weight_bits, **fields)


def pieces(seed=0, padding="torch", **fields):
    made = export_networks.pieces(settings(**fields), SHAPE, padding=padding)
    return graph_of(quantized(made, SHAPE, seed=seed))


def resnet(shortcut="identity", **fields):
    model = ConfigDict({"name": "cifar_resnet", "depth": 8, "width": 4, "shortcut": shortcut})
    made = registry.make(model, CLASSES, settings(**fields), image_shape=SHAPE)
    return graph_of(quantized(made, SHAPE))


def run(content, graph, pixels=PIXELS):
    images = integer_runtime.channels_first(normalise(pixels, graph))
    return integer_runtime.session(content).run(None, {IMAGE: images})[0]


def in_steps(graph):
    """Returns tensor -> root mean square distance from the exact model, in its storage's steps."""
    steps, images = integer_plan.fold(graph.nodes), normalise(PIXELS, graph)
    ranges = integer_runtime._ranges(graph, integer_plan.streams(steps), images)
    plan = integer_plan.plan(steps, ranges)
    names = [step.output for step in steps if step.output in plan.storage]
    models = onnx_files.qcdq_model(graph), integer_model(graph, plan)
    wanted, found = (
        _tensors(content, names, end) for content, end in zip(models, ("", "/levels"), strict=True)
    )
    distances = {}
    for name, x, levels in zip(names, wanted, found, strict=True):
        stored = plan.storage[name]
        levels = levels.astype(np.float64) - stored.zero
        inside = np.clip(x / stored.step, stored.low - stored.zero, stored.high - stored.zero)
        distances[name] = float(np.sqrt(np.mean((levels - inside) ** 2)))
    return distances


def _tensors(content, names, end):
    model = onnx.load_from_string(content)
    known = {info.name: info for info in model.graph.value_info}
    model.graph.output.extend(known[f"{name}{end}"] for name in names)
    images = integer_runtime.channels_first(np.float32(PIXELS) / np.float32(255))
    inputs = {IMAGE: images}
    session = integer_runtime.session(model.SerializeToString())
    return session.run([f"{name}{end}" for name in names], inputs)


def deployed():
    model = intercepted("Deployed", settings(), SHAPE)
    return graph_of(calibrated(model, np.float32(PIXELS) / np.float32(255)))


# Accuracy --------------------------------------------------------------------------------------


# Rounding once is 0.29 steps; every operation adds its own, and what those before it made.
@pytest.mark.parametrize("padding", ["torch", "tf"])
@pytest.mark.parametrize(("bits", "most"), [((8, 7), 1.5), ((5, 4), 6.0)])
def test_every_tensor_is_close_to_the_exact_one(bits, most, padding):
    found = in_steps(pieces(padding=padding, act_bits=bits))
    assert max(found.values()) < most and found["stem_bn"] < 0.3


@pytest.mark.parametrize(
    "fields", [{"shortcut": "identity"}, {"shortcut": "conv"}, {"image_bits": 32}]
)
def test_every_tensor_of_a_resnet(fields):
    found = in_steps(resnet(**fields))
    assert max(found.values()) < 1.5


def test_every_tensor_of_a_network_as_users_write_it():
    found = in_steps(deployed())
    assert len(found) > 10 and max(found.values()) < 7.0 and np.median([*found.values()]) < 2.5


def test_weights_of_4_bits_change_no_score():
    graph = pieces(weight_bits=(4, 3))
    plain, packed = integer_runtime.integer_files(graph, PIXELS)
    np.testing.assert_array_equal(run(packed, graph), run(plain, graph))
    assert np.abs(run(plain, graph) - executor.run(graph, normalise(PIXELS, graph))).max() < 0.1


@pytest.mark.parametrize("graph", [pieces, resnet, deployed])
def test_everything_between_image_and_scores_runs_on_integers(graph):
    plain, packed = integer_runtime.integer_files(graph(), PIXELS)
    for content in (plain, packed):
        found = integer_runtime.kernels(content)
        assert integer_runtime.in_float(found) == {}
        layers = found["QLinearConv"] + found["QGemm"]
        assert layers == len(graph().layers)
        assert found["QuantizeLinear"] == 1  # the image


def test_float_kernels_are_counted():
    graph = resnet()
    found = integer_runtime.measured(graph, {card.QCDQ: onnx_files.qcdq_model(graph)})
    assert sum(found["in_float"].values()) > len(graph.layers)
    assert found["milliseconds"].keys() == {"float32", card.QCDQ}
    assert min(found["milliseconds"].values()) > 0


# What is stored --------------------------------------------------------------------------------


def test_batch_norm_and_relu_join_their_layer():
    graph = pieces()
    steps = {step.output: step for step in integer_plan.fold(graph.nodes)}
    step = steps["relu6"]
    assert step.node.name == "grouped" and step.most == 6 and "hswish" in steps
    affine = next(node for node in graph.nodes if node.name == "grouped_bn")
    kernel = step.node.kernel
    wanted = kernel.levels * kernel.step * affine.arrays["scale"]
    np.testing.assert_allclose(step.levels * step.step, wanted, rtol=1e-6)
    np.testing.assert_allclose(step.bias, affine.arrays["offset"], rtol=1e-6)
    assert (step.step >= 0).all()


def test_negative_scales_turn_the_levels_around():
    graph = _small(scale=[-2.0, 0.5], offset=[1.0, -1.0], bias=[0.25, 0.5])
    (step,) = integer_plan.fold(graph.nodes)
    np.testing.assert_array_equal(step.levels, [[-3, -2], [7, 1]])
    np.testing.assert_allclose(step.step, [0.2, 0.1])
    np.testing.assert_allclose(step.bias, [0.5, -0.75])  # bias times scale plus offset


def _small(scale, offset, bias=(0.0, 0.0), act=None):
    """A dense layer with batch norm, of two pixels."""
    kernel = Kernel(4, np.int8([[3, -2], [-7, 1]]), np.float32([0.1, 0.2]))
    quantizer = act or Quantizer(4, False, 0.1, 0.0)
    arrays = {"scale": np.float32(scale), "offset": np.float32(offset)}
    flatten = Node("flatten", "pixels", (IMAGE,), (2,))
    dense = Node("dense", "fc", ("pixels",), (2,), arrays={"bias": np.float32(bias)},
                 quantizer=quantizer, kernel=kernel)  # fmt: skip
    norm = Node("affine", "bn", ("fc",), (2,), arrays=arrays)
    graph = Graph("small", (1, 2, 1), 2, (0.0,), (1.0,), {"layers": {}}, (flatten, dense, norm))
    return graph if act else dataclasses.replace(graph, nodes=(dense, norm))


@pytest.mark.parametrize("scale", [[1e-12, 0.0], [0.5, 1e-9]])
def test_channels_that_are_nearly_constant(scale):
    graph = _small(scale, [3.0, -4.0], act=Quantizer(8, False, 1 / 255, 0.0))
    plan = integer_plan.plan(integer_plan.fold(graph.nodes), {})
    pixels = np.uint8([[[[0], [255]]], [[[255], [0]]]])
    images = normalise(pixels, graph)
    found = run(integer_model(graph, plan), graph, pixels)
    np.testing.assert_allclose(found, executor.run(graph, images), rtol=1e-6, atol=1e-6)


def test_ranges_are_those_of_all_images():
    graph = resnet()
    names = integer_plan.streams(integer_plan.fold(graph.nodes))
    images = normalise(PIXELS, graph)
    images[8:] /= 4  # only the first of three calls meets the ends
    found = integer_runtime._ranges(graph, names, images)
    first, *_ = parts = [integer_runtime._ranges(graph, names, x) for x in np.split(images, 3)]
    for name, (low, high) in found.items():
        assert low == min(part[name][0] for part in parts)
        assert high == max(part[name][1] for part in parts)
    assert found == first


def test_how_tensors_are_stored():
    graph = pieces(act_bits=(5, 4))
    steps = integer_plan.fold(graph.nodes)
    several = integer_plan.streams(steps)
    ranges = dict.fromkeys(several, (-1.0, 7.0))
    plan = integer_plan.plan(steps, ranges)
    nodes = {node.name: node for node in graph.nodes}
    # Taken by one layer: at its levels.
    step, zero, low, high = plan.storage["add"]
    quantizer = nodes["depthwise"].quantizer
    assert (step, zero, (low - zero, high - zero)) == (quantizer.step, 128, quantizer.bounds)
    # Taken by a layer and an addition: the layer's step is an odd number of steps.
    for most in (3.0, 4.0, 5.0, 7.0):
        storage = integer_plan.plan(steps, dict.fromkeys(several, (0.0, most))).storage
        odd = nodes["signed"].quantizer.step / storage["relu6"].step
        assert odd == pytest.approx(round(odd)) and round(odd) % 2 == 1
    # Before hard swish: 3 is a number of steps; before a shifted layer: the shift.
    for name, start in (("stem_bn", 3.0), ("hswish", 3 / 8)):
        stored = plan.storage[name]
        assert stored.step * stored.zero == pytest.approx(start)
        assert (255 - stored.zero) * stored.step == pytest.approx(7, rel=0.1)
    assert "fc" not in plan.storage and plan.streams >= {"stem_bn", "relu6"}


def test_shifted_layers_of_8_bits_need_no_table():
    graph = _small([1.0, 1.0], [0.0, 0.0], act=Quantizer(8, False, 0.01, 0.375))
    plan = integer_plan.plan(integer_plan.fold(graph.nodes), {})
    assert plan.storage[IMAGE] == Storage(0.01, 38) and not plan.streams


def test_a_relu6_ends_at_6():
    relu6 = Node("relu6", "act", ("fc",), (2,))
    graph = _small([1.0, 1.0], [0.0, 0.0])
    last = Node("dense", "last", ("act",), (2,), quantizer=Quantizer(8, False, 0.1, 0.0),
                kernel=graph.nodes[0].kernel)  # fmt: skip
    graph = dataclasses.replace(graph, nodes=(graph.nodes[0], relu6, last))
    assert integer_plan.plan(integer_plan.fold(graph.nodes), {}).storage["act"].high == 60


@pytest.mark.parametrize(
    "quantizer", [Quantizer(4, True, 0.1, 0.0), Quantizer(8, False, 0.01, 0.3)]
)
def test_a_relu_ends_at_0_whatever_takes_it(quantizer):
    relu = Node("relu", "act", ("fc",), (2,))
    graph = _small([1.0, 1.0], [0.0, 0.0])
    last = Node("dense", "last", ("act",), (2,), quantizer=quantizer, kernel=graph.nodes[0].kernel)
    graph = dataclasses.replace(graph, nodes=(graph.nodes[0], relu, last))
    stored = integer_plan.plan(integer_plan.fold(graph.nodes), {}).storage["act"]
    assert stored.low == stored.zero > 0


def _cut(op, shape, **options):
    """An image of 4 x 4 x 2, cut or padded, and a layer that is not folded into it."""
    options_of_conv = {"stride": 1, "groups": 1, "padding": ((0, 0), (0, 0))}
    kernel = Kernel(8, np.ones((1, 1, 2, 2), np.int8), np.ones(2, np.float32))
    conv = Node("conv", "conv", (IMAGE,), (4, 4, 2), options_of_conv, kernel=kernel)
    cut = Node(op, "cut", ("conv",), shape, options)
    tanh = Node("tanh", "tanh", ("cut",), shape)  # an operation of general networks
    return Graph("cut", (4, 4, 2), 2, (0.0,), (1.0,), {"layers": {}}, (conv, cut, tanh))


@pytest.mark.parametrize(
    ("op", "shape", "options", "found"),
    [
        ("slice", (2, 2, 2), {"bounds": ((0, 4, 2), (0, 4, 2), (0, 2, 1))}, "subsample"),
        ("slice", (2, 2, 2), {"bounds": ((0, 3, 2), (0, 4, 2), (0, 2, 1))}, "subsample"),  # 0 and 2
        ("slice", (2, 2, 2), {"bounds": ((0, 2, 1), (0, 2, 1), (0, 2, 1))}, "slice"),  # a crop
        ("slice", (4, 4, 1), {"bounds": ((0, 4, 1), (0, 4, 1), (0, 1, 1))}, "slice"),
        ("slice", (3, 3, 2), {"bounds": ((1, 4, 1), (1, 4, 1), (0, 2, 1))}, "slice"),
        ("slice", (2, 4, 2), {"bounds": ((0, 4, 2), (0, 4, 1), (0, 2, 1))}, "slice"),
        ("pad", (4, 4, 4), {"margins": ((0, 0), (0, 0), (1, 1)), "value": 0.0}, "subsample"),
        ("pad", (4, 4, 4), {"margins": ((0, 0), (0, 0), (1, 1)), "value": 1.0}, "pad"),
        ("pad", (6, 4, 2), {"margins": ((1, 1), (0, 0), (0, 0)), "value": 0.0}, "pad"),
    ],
)
def test_what_is_a_shortcut_and_what_is_not(op, shape, options, found):
    _, cut, _ = recognised(_cut(op, shape, **options).nodes, (4, 4, 2))
    assert cut.op == found


def test_kernels_are_multiples_of_their_levels_as_far_as_16_bits_allow():
    graph = resnet(act_bits=(8, 4), weight_bits=(4, 3))
    plain, packed = (onnx.load_from_string(c) for c in integer_runtime.integer_files(graph, PIXELS))
    stored = {each.name: each for each in plain.graph.initializer}
    narrow = {each.name: each for each in packed.graph.initializer}
    factors = set()
    for node in graph.layers:
        name = f"{node.name}/kernel/levels"
        levels = onnx.numpy_helper.to_array(stored[name]).astype(int)
        level = (
            node.kernel.levels.transpose(3, 2, 0, 1) if node.op == "conv" else node.kernel.levels
        )
        factor = np.abs(levels).max() // max(np.abs(level).max(), 1)
        np.testing.assert_array_equal(np.abs(levels), factor * np.abs(level.astype(int)))
        act = node.quantizer
        most = 128 + act.bounds[1] if act.signed else act.bounds[1]
        if node.kernel.bits <= 4:
            assert 2 * most * np.abs(levels).max() < 2**15
            assert narrow[f"{name}/int4"].data_type == onnx.TensorProto.INT4
            assert len(narrow[f"{name}/int4"].raw_data) == -(-level.size // 2)
            factors.add(int(factor))
    assert len(factors) > 1
    assert (plain.opset_import[0].version, packed.opset_import[0].version) == (17, 21)


# Where it cannot be ----------------------------------------------------------------------------


def test_what_has_no_integer_kernel_is_named(monkeypatch):
    graph = resnet()
    assert integer_runtime.obstacle() == integer_runtime.litert_obstacle(graph) == ""
    tanh = Node("tanh", "t", (graph.nodes[-1].name,), graph.nodes[-1].shape)
    other = dataclasses.replace(graph, nodes=(*graph.nodes, tanh))
    assert "tanh has no integer kernel" in integer_runtime.litert_obstacle(other)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'metamix_jax[export]'" in integer_runtime.obstacle()
