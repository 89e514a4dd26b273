"""Traced networks exported from their jaxpr: every form against JAX, and what is refused."""

import io
import json

import jax
import numpy as np
import pytest

from metamix_jax.errors import UserError
from metamix_jax.exporters import (
    bundle,
    executor,
    integer_runtime,
    lowering,
    onnx_channels_first,
    onnx_channels_last,
    onnx_files,
)
from metamix_jax.exporters.build import obstacle
from metamix_jax.exporters.graph import IMAGE, OPS, result_shape
from metamix_jax.exporters.operations import OPERATIONS
from metamix_jax.exporters.stablehlo import stablehlo
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.selection import cost
from tests.helpers import export_networks
from tests.helpers.export_networks import graph_of, random_images
from tests.helpers.tiny_network import compiled

SHAPE = (9, 9, 1)
IMAGES = random_images(SHAPE, count=4)
KEYS = {"params": jax.random.key(0), "quant": jax.random.key(2)}
NAMES = ("Net", "NnxNet", "Everything")
SETTINGS = QuantSettings(act_bits=(8, 5, 3), weight_bits=(6, 4))


def intercepted(name):
    return export_networks.intercepted(name, SETTINGS, SHAPE)


def quantized(model, seed=0):
    return export_networks.calibrated(model, IMAGES, seed)


@pytest.fixture(scope="module", params=NAMES)
def exported(request):
    """A network, its graph, its scores in JAX and the inputs of its layers there."""
    network = quantized(intercepted(request.param))
    model, precision = network.network.model, network.precision

    @compiled
    def run(variables):
        return model.apply(variables, IMAGES, precision=precision, mutable=["intermediates"])

    scores, sown = run(network.variables)
    return network, graph_of(network), np.asarray(scores), sown["intermediates"]


def inputs_of(sown, path):
    found = sown
    for key in path.split("/"):
        found = found[key]
    return [np.asarray(x) for x in found["quantizer_input"]]


def test_levels_and_scores_in_numpy(exported):
    network, graph, scores, sown = exported
    assert np.std(scores, axis=0).min() > 1e-3  # differ between images
    levels = {}

    def record(node, found):
        levels[node.name] = found
        return found

    np.testing.assert_allclose(executor.run(graph, IMAGES, record), scores, atol=2e-5)
    assert {name.partition("@")[0] for name in levels} <= network.network.costs.keys()
    for node in graph.layers:
        path, _, number = node.name.partition("@")
        x = inputs_of(sown, path)[int(number or 1) - 1]
        wanted = executor.quantize(x, node.quantizer)
        # Dense layers get their input as rows; the values are the same, in another order.
        found = np.sort(levels[node.name].ravel()), np.sort(wanted.ravel())
        assert found[0].shape == found[1].shape
        assert np.mean(found[0] != found[1]) < 2e-3, node.name
        bits = network.policy.bits[path]
        assert (node.quantizer.bits, node.kernel.bits) == bits


def test_the_bundle_is_the_same_graph(exported):
    _, graph, _, _ = exported
    read = bundle.decode(bundle.encode(graph), "here")
    np.testing.assert_array_equal(executor.run(read, IMAGES), executor.run(graph, IMAGES))
    contents = bundle.encode(graph)
    generator, wrong = np.random.default_rng(0), {}
    wrong["shape"] = lambda shape: [*shape, 2]
    wrong["order"] = lambda order: [*order[:-1], order[0]]
    wrong["axes"] = lambda axes: [99]
    wrong["bounds"] = lambda bounds: [[0, 99, 1], *bounds[1:]]
    for option, change in wrong.items():
        content = json.loads(contents[bundle.GRAPH])
        rows = [row for row in content["nodes"] if option in row.get("options", {})]
        if not rows:
            continue
        row = rows[generator.integers(len(rows))]
        row["options"][option] = change(row["options"][option])
        content.pop("sha256")
        content["sha256"] = bundle._digest(content)
        text = json.dumps(content).encode()
        with pytest.raises(UserError, match="damaged or not part of a bundle"):
            bundle.decode(contents | {bundle.GRAPH: text}, "here")


def test_every_tensor_has_the_shape_that_its_node_states(exported):
    _, graph, _, _ = exported
    tensors = {IMAGE: IMAGES}
    for node in graph.nodes:
        inputs = [tensors[name] for name in node.inputs]
        if node.kernel is not None:
            levels = executor.quantize(inputs[0], node.quantizer)
            sums = executor.integer_product(node, levels)
            found = executor.real_output(node, sums, inputs[0].shape[1:])
        elif node.op in OPERATIONS:
            found = OPERATIONS[node.op].run(np, node, *inputs)
        elif node.op in executor.CONVOLUTIONAL:
            found = executor.CONVOLUTIONAL[node.op](np, node, *inputs)
        else:
            assert node.op == "product"
            found = executor.matrix_product(node, *inputs)
        assert found.dtype == np.float32, node.op
        assert found.shape[1:] == node.shape, node
        assert found.shape[0] in (1, len(IMAGES))
        assert node.shape == result_shape(node, [graph.shape_of(name) for name in node.inputs])
        tensors[node.name] = found


def test_scores_in_onnxruntime(exported):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, graph, scores, _ = exported
    session = onnxruntime.InferenceSession(onnx_files.qcdq_model(graph))
    for images in (IMAGES, IMAGES[:1]):
        (found,) = session.run(None, {IMAGE: images.transpose(0, 3, 1, 2)})
        np.testing.assert_allclose(found, scores[: len(images)], atol=2e-5)


@pytest.mark.filterwarnings("default")
def test_scores_in_qonnx(exported):
    pytest.importorskip("qonnx")
    import onnx
    from qonnx.core import onnx_exec
    from qonnx.core.modelwrapper import ModelWrapper

    _, graph, scores, _ = exported
    model = ModelWrapper(onnx.load(io.BytesIO(onnx_files.qonnx_model(graph))))
    found = onnx_exec.execute_onnx(model, {IMAGE: IMAGES[:1].transpose(0, 3, 1, 2)})["scores"]
    np.testing.assert_allclose(found, scores[:1], atol=2e-5)


def test_scores_of_the_stablehlo(exported):
    network, _, scores, _ = exported
    model, variables = network.network.model, network.variables
    content = stablehlo(model, variables, network.precision, SHAPE)
    found = jax.export.deserialize(bytearray(content)).call(IMAGES)
    np.testing.assert_allclose(found, scores, atol=2e-5)


def test_code_that_counts_images_gets_a_stablehlo_for_one(caplog):
    network = quantized(intercepted("Counts"))
    model, variables = network.network.model, network.variables
    content = stablehlo(model, variables, network.precision, SHAPE)
    assert "takes one image" in caplog.text
    found = jax.export.deserialize(bytearray(content)).call(IMAGES[:1])
    np.testing.assert_allclose(found, executor.run(graph_of(network), IMAGES[:1]), atol=2e-5)


def test_every_operation_is_exported_once():
    network = quantized(intercepted("Everything"))
    nodes = lowering.lower(network.network.model, network.variables, network.policy.bits, SHAPE)
    classic = OPS.keys() - OPERATIONS.keys() - {"conv", "dense", "product"}
    used = {node.op for node in nodes}
    # erf and rsqrt are folded or absent on some versions of JAX; the rest is there.
    assert OPS.keys() - classic - used <= {"rsqrt", "negate", "less", "less_equal", "erf",
                                           "greater_equal", "abs", "least", "layer_norm",
                                           "softmax", "gelu"}  # fmt: skip
    assert onnx_channels_last.LOWERINGS.keys() == OPS.keys()
    assert onnx_channels_first.LOWERINGS.keys() >= classic
    made = {*lowering.UNARY.values(), *lowering.BINARY.values(), *lowering.REDUCTIONS.values(),
            *lowering.WINDOWS.values()}  # fmt: skip
    assert made <= OPERATIONS.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Sorts", r"Sorts: sort in the network cannot be exported \(.*own_networks.py:\d+\)"),
        (
            "Dilated",
            r"Dilated: conv_general_dilated in wide cannot be.*own_networks.py:\d+\); expe",
        ),
        ("Mixes", r"Mixes: reduce_sum in the network cannot be.*; it runs over the images"),
    ],
)
def test_what_cannot_be_exported_is_named_before_training(name, message):
    model = intercepted(name)
    found = obstacle(model, cost.layer_costs(model, SHAPE), SHAPE)
    with pytest.raises(UserError, match=message):
        raise UserError(found)


def test_what_can_be_exported_has_no_obstacle():
    model = intercepted("Net")
    assert obstacle(model, cost.layer_costs(model, SHAPE), SHAPE) == ""


def test_integers_are_multiplied_where_nothing_is_shifted():
    graph = graph_of(quantized(intercepted("NnxNet")))
    products = [node for node in graph.nodes if node.op == "product"]
    assert len(products) == 2
    for node in products:
        assert not node.quantizer.shift and not node.other.shift
        x, y = (random_images(graph.shape_of(name)) for name in node.inputs)
        left, right = executor.quantize(x, node.quantizer), executor.quantize(y, node.other)
        scale = np.float32(node.quantizer.step) * np.float32(node.other.step)
        wanted = (left.astype(np.int64) @ right.astype(np.int64)).astype(np.float32) * scale
        np.testing.assert_array_equal(executor.matrix_product(node, x, y), wanted)


def test_a_shared_layer_is_stored_once():
    graph = graph_of(quantized(intercepted("Net")))
    runs = [node for node in graph.layers if node.name.startswith("Block_0/Conv_1")]
    assert len(runs) == 2
    rest = [node for node in graph.layers if "@" not in node.name]
    sizes = [-(-node.kernel.levels.size * node.kernel.bits // 8) for node in rest]
    assert len(bundle.encode(graph)[bundle.WEIGHTS]) == len(bundle.MAGIC) + sum(sizes)
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pixels = np.zeros((2, *SHAPE), np.uint8)
    models = [onnx_files.qcdq_model(graph), onnx_files.qonnx_model(graph)]
    models += integer_runtime.integer_files(graph, pixels)
    for content in models:
        model = onnx.load_from_string(content)
        names = {each.name for each in model.graph.initializer}
        kernels = {name.rpartition("/kernel/")[0] for name in names if name.endswith(
            ("/kernel/levels", "/kernel/real", "/kernel/levels/int4"))}  # fmt: skip
        assert kernels == {node.name for node in rest}
