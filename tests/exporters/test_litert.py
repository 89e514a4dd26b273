"""The LiteRT file: close to the exact network, all of it in integers, and refused if damaged."""

import numpy as np
import pytest
from flax import linen as nn

from metamix_jax.errors import UserError
from metamix_jax.exporters import executor, integer_runtime, litert, litert_reader, litert_writer
from metamix_jax.exporters.graph import IMAGE, normalise
from metamix_jax.networks import own
from metamix_jax.networks.precision import QuantSettings
from tests.helpers import zoo
from tests.helpers.export_networks import calibrated, graph_of, intercepted, pieces, quantized

pytest.importorskip("ai_edge_litert")
pytest.importorskip("onnxruntime")

SHAPE = (11, 9, 3)
PIXELS = np.random.default_rng(0).integers(0, 256, (24, *SHAPE), np.uint8)
WIDE = QuantSettings(act_bits=(8, 7), weight_bits=(8, 7))


def resnet(settings, **fields):
    return quantized(
        zoo.make("cifar_resnet", settings, SHAPE, 5, depth=8, width=4, **fields), SHAPE
    )


NETWORKS = {
    "pieces": lambda: quantized(pieces(WIDE, SHAPE), SHAPE),
    "padded as in TensorFlow": lambda: quantized(pieces(WIDE, SHAPE, padding="tf"), SHAPE),
    "few bits": lambda: quantized(
        pieces(QuantSettings(act_bits=(5, 4), weight_bits=(4, 3)), SHAPE), SHAPE
    ),
    "image in floats": lambda: quantized(
        pieces(QuantSettings(act_bits=(8, 7), image_bits=32), SHAPE), SHAPE
    ),
    "as users write it": lambda: calibrated(
        intercepted("Deployed", WIDE, SHAPE), np.float32(PIXELS) / np.float32(255)
    ),
    "shortcuts": lambda: resnet(WIDE),
    "shortcuts that are convolutions": lambda: resnet(WIDE, shortcut="conv"),
    "few bits and shortcuts": lambda: resnet(QuantSettings(act_bits=(4, 3), weight_bits=(4, 3))),
}


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tmp_path_factory):
    """A network's name, its graph and its file."""
    graph = graph_of(NETWORKS[request.param]())
    path = tmp_path_factory.mktemp("litert") / "network.tflite"
    path.write_bytes(integer_runtime.litert_file(graph, PIXELS))
    return request.param, graph, path


def test_scores_are_about_as_close_as_onnxruntimes(exported):
    _, graph, path = exported
    exact = executor.run(graph, normalise(PIXELS, graph))
    found = _scores_without_delegate(path, normalise(PIXELS, graph))
    onnx = integer_runtime.session(integer_runtime.integer_files(graph, PIXELS)[0])
    images = integer_runtime.channels_first(normalise(PIXELS, graph))
    other = onnx.run(None, {IMAGE: images})[0]
    rounding = litert.SCORES_MARGIN * np.ptp(exact) / 255  # of the scores, which ONNX leaves out
    apart, other_apart = (np.sqrt(np.mean((x - exact) ** 2)) for x in (found, other))
    assert found.shape == exact.shape
    assert apart < 2.5 * other_apart + rounding
    # The delegate rounds products in another way, which shows where levels are few.
    default = litert_reader.read(path).scores(PIXELS)
    assert np.sqrt(np.mean((default - exact) ** 2)) < 0.15 * np.ptp(exact)


def _scores_without_delegate(path, images):
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(str(path), experimental_op_resolver_type=plain)
    place = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(place, images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(place, images)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def test_everything_is_on_integers(exported):
    _, graph, path = exported
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    ops = [op["op_name"] for op in interpreter._get_ops_details() if op["op_name"] != "DELEGATE"]
    floats = [
        tensor for tensor in interpreter.get_tensor_details()
        if tensor["dtype"] == np.float32 and tensor["name"] not in (IMAGE, "scores")
    ]  # fmt: skip
    assert not [tensor["name"] for tensor in floats]
    layers = [op for op in ops if op in ("CONV_2D", "DEPTHWISE_CONV_2D")]
    assert len(layers) == len(graph.layers)


def test_kernels_are_multiples_of_their_levels(exported):
    """Biases have the steps of input and kernel, which would be too coarse at few bits."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(exported[2]))
    details = [each for each in interpreter.get_tensor_details() if "/kernel" in each["name"]]
    assert len(details) == len(exported[1].layers)
    for each in details:
        assert 63 < np.abs(interpreter.get_tensor(each["index"]).astype(int)).max() < 128


class Twice(nn.Module):
    """A layer that runs twice."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Conv(3, (3, 3), use_bias=False, name="layer")
        return nn.Dense(5, name="head")(nn.relu(layer(nn.relu(layer(x)))).mean((1, 2)))


def test_a_kernel_that_is_used_again_is_stored_once():
    made = own.make("twice", {}, 5, WIDE, SHAPE, model=Twice())
    graph = graph_of(calibrated(made, np.float32(PIXELS) / np.float32(255)))
    assert [node.name for node in graph.layers] == ["layer", "layer@2", "head"]
    schema = litert_writer.require_litert()
    model = schema.ModelT.InitFromPackedBuf(integer_runtime.litert_file(graph, PIXELS))
    (subgraph,) = model.subgraphs
    buffers = {tensor.name.decode(): tensor.buffer for tensor in subgraph.tensors}
    assert buffers["layer/kernel"] == buffers["layer@2/kernel"] != buffers["head/kernel"]


def test_one_image_and_many(exported):
    network = litert_reader.read(exported[2])
    together = network.scores(PIXELS[:3])
    one_by_one = np.concatenate([network.scores(PIXELS[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(together, one_by_one, atol=1e-6)
    assert network.milliseconds() > 0


def test_damaged_and_foreign_files_are_refused(tmp_path):
    graph, path = graph_of(NETWORKS["pieces"]()), tmp_path / "whole.tflite"
    path.write_bytes(integer_runtime.litert_file(graph, PIXELS))
    content, generator = path.read_bytes(), np.random.default_rng(0)
    network = litert_reader.read(path)
    assert (network.image_shape, network.num_classes) == (SHAPE, graph.num_classes)
    assert (network.mean, network.std) == (graph.mean, graph.std)
    damaged = [b"", b"text", content[:-1000], content[: len(content) // 2], content + b"0"]
    for place in generator.integers(0, len(content), 60):
        damaged.append(bytearray(content))
        damaged[-1][place] ^= 1 << generator.integers(8)
    damaged_path = tmp_path / "network.tflite"
    for each in damaged:
        damaged_path.write_bytes(each)
        with pytest.raises(UserError, match="damaged, or not written by --mode=export") as caught:
            litert_reader.read(damaged_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        litert_reader.read(tmp_path / "none.tflite")


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert", None)
    with pytest.raises(
        UserError, match=r"needs ai-edge-litert: pip install 'metamix_jax\[litert\]'"
    ):
        litert_writer.require_litert()
