"""The files of an export: content, sizes and rejection of damaged files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metamix_jax.errors import UserError
from metamix_jax.exporters import bundle, executor, onnx_files
from metamix_jax.exporters.card import QCDQ, QONNX, card
from metamix_jax.networks.precision import QuantSettings
from tests.helpers.export_networks import (
    CLASSES,
    graph_of,
    pieces,
    quantized,
    random_images,
)

SHAPE = (11, 9, 3)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def network():
    settings = QuantSettings(act_bits=(8, 4, 3, 2), weight_bits=(8, 4, 3, 2))
    network = quantized(pieces(settings, SHAPE), SHAPE, seed=3)
    return network, graph_of(network)


@pytest.fixture(scope="module")
def graph(network):
    return network[1]


@pytest.fixture
def directory(graph, tmp_path):
    for name, content in bundle.encode(graph).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def scores(graph):
    return executor.run(graph, random_images(SHAPE))


# The bundle ------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(graph, directory):
    found = bundle.read_bundle(directory)
    assert np.array_equal(scores(found), scores(graph))
    assert json.dumps(found.policy) == json.dumps(graph.policy)
    for wanted, node in zip(graph.nodes, found.nodes, strict=True):
        assert (node.op, node.name, node.inputs, node.shape) == (
            wanted.op, wanted.name, wanted.inputs, wanted.shape,
        )  # fmt: skip
        assert (node.quantizer, node.options) == (wanted.quantizer, wanted.options)


def test_sizes_are_the_policys_arithmetic(graph, directory):
    layers = graph.policy["layers"]
    assert len({row["weight_bits"] for row in layers.values()}) > 2
    expected = 8 + sum(
        -(-node.kernel.levels.size * layers[node.name]["weight_bits"] // 8) for node in graph.layers
    )
    assert (directory / bundle.WEIGHTS).stat().st_size == expected
    floats = sum(
        sum(array.size for array in node.arrays.values())
        + (node.kernel.step.size if node.kernel else 0)
        for node in graph.nodes
    )
    assert (directory / bundle.SCALES).stat().st_size == 4 * floats


@pytest.mark.parametrize("name", bundle.FILES)
def test_any_flipped_bit_or_missing_byte_is_noticed(name, directory):
    content = (directory / name).read_bytes()
    generator = np.random.default_rng(0)
    for place in [0, len(content) - 2, *generator.integers(0, len(content), 30)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.integers(8)
        (directory / name).write_bytes(damaged)
        with pytest.raises(UserError, match=str(directory)):
            bundle.read_bundle(directory)
    for damaged in (content[:-2], content[: len(content) // 2], b"", content + b"\0\0"):
        (directory / name).write_bytes(damaged)
        with pytest.raises(UserError, match=str(directory)):
            bundle.read_bundle(directory)
    (directory / name).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        bundle.read_bundle(directory)


def rewritten(directory, change):
    """Changes graph.json and recomputes its digest."""
    path = directory / bundle.GRAPH
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content, content["nodes"])
    path.write_text(json.dumps(content | {"sha256": bundle._digest(content)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda content, nodes: content.update(format="another"),
        lambda content, nodes: content.update(version=2),
        lambda content, nodes: content.pop("files"),
        lambda content, nodes: content.update(nodes=[]),
        lambda content, nodes: content.update(nodes={"0": 1}),
        lambda content, nodes: nodes.reverse(),
        lambda content, nodes: nodes.pop(),
        lambda content, nodes: nodes[1].update(op="eval"),
        lambda content, nodes: nodes[0]["kernel"].update(bits=64),
        lambda content, nodes: nodes[0]["kernel"].update(offset=10**9),
        lambda content, nodes: nodes[0]["kernel"].update(shape=[10**9, 10**9]),
        lambda content, nodes: nodes[0]["kernel"].update(shape=[-1, 3, 3, 8]),
        lambda content, nodes: nodes[0]["quantizer"].update(step=0.0),
        lambda content, nodes: nodes[0].pop("kernel"),
        lambda content, nodes: nodes[0]["kernel"]["step"].update(count=1),
        lambda content, nodes: nodes[0]["quantizer"].update(bits=2.5),
        lambda content, nodes: nodes[0]["quantizer"].update(shift=float("nan")),
        lambda content, nodes: nodes[0].update(inputs=["elsewhere"]),
        lambda content, nodes: nodes[0].update(shape=[11, 9, 8, 1]),
        lambda content, nodes: nodes[0].pop("options"),
        lambda content, nodes: nodes[0]["options"].update(stride=0),
        lambda content, nodes: nodes[0]["options"].update(padding=[[10**9, 0], [0, 0]]),
        lambda content, nodes: nodes[1]["arrays"].pop("offset"),
        lambda content, nodes: content.update(image_shape=[11, 9]),
        lambda content, nodes: content.update(mean=["none"]),
        lambda content, nodes: content.update(std=[float("inf")]),
    ],
)
def test_foreign_graphs_are_refused(change, directory):
    rewritten(directory, lambda content, nodes: None)
    bundle.read_bundle(directory)
    rewritten(directory, change)
    with pytest.raises(UserError, match=str(directory)):
        bundle.read_bundle(directory)


def test_reading_and_running_takes_numpy_alone(directory):
    np.save(directory / "images.npy", random_images(SHAPE))
    program = (
        "import sys, numpy as np\n"
        "sys.modules.update(dict.fromkeys(['jax', 'flax', 'onnx', 'scipy', 'ml_collections']))\n"
        "from metamix_jax.exporters import bundle, executor\n"
        f"graph = bundle.read_bundle({str(directory)!r})\n"
        f"print(executor.run(graph, np.load({str(directory / 'images.npy')!r})).shape)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.stdout == f"(3, {CLASSES})\n"


# ONNX ------------------------------------------------------------------------------------------


def test_onnxruntime_agrees_at_its_default_level_and_any_batch(graph):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    content = onnx_files.qcdq_model(graph)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 11, 9]
    images = random_images(SHAPE, count=4)
    for count in (1, 4):
        inputs = {"image": np.ascontiguousarray(images[:count].transpose(0, 3, 1, 2))}
        (found,) = session.run(None, inputs)
        np.testing.assert_allclose(found, executor.run(graph, images[:count]), atol=1e-4)


def test_onnx_kernels_are_the_levels_in_8_bit_containers(graph):
    onnx = pytest.importorskip("onnx")
    model = onnx.load_model_from_string(onnx_files.qcdq_model(graph))
    assert (model.ir_version, model.opset_import[0].version) == (8, 17)
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    for node in graph.layers:
        levels = constants[f"{node.name}/kernel/levels"]
        assert levels.dtype == np.int8 and levels.size == node.kernel.levels.size
        low, high = node.quantizer.bounds
        if (low, high) != (0, 255):
            assert constants[f"{node.name}/input/low"] == low
            assert constants[f"{node.name}/input/high"] == high


def test_qonnx_carries_each_layers_bits(graph):
    onnx = pytest.importorskip("onnx")
    model = onnx.load_model_from_string(onnx_files.qonnx_model(graph))
    bits = {c.name: onnx.numpy_helper.to_array(c) for c in model.graph.initializer}
    for path, row in graph.policy["layers"].items():
        assert bits[f"{path}/input/bits"] == row["act_bits"]
        assert bits[f"{path}/kernel/bits"] == row["weight_bits"]
    quants = [node for node in model.graph.node if node.op_type == "Quant"]
    assert len(quants) == 2 * len(graph.layers)
    assert {node.domain for node in quants} == {"qonnx.custom_op.general"}


@pytest.mark.filterwarnings("default")  # for qonnx
def test_qonnx_agrees_and_counts_our_bops(graph):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("qonnx")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.inference_cost import inference_cost

    model = ModelWrapper(onnx.load_model_from_string(onnx_files.qonnx_model(graph)))
    images = random_images(SHAPE, count=1)
    found = execute_onnx(model, {"image": images.transpose(0, 3, 1, 2).copy()})["scores"]
    np.testing.assert_allclose(found, executor.run(graph, images), atol=1e-4)
    total = inference_cost(model, discount_sparsity=False)["total_cost"]
    layers = graph.policy["layers"].values()
    assert total["total_bops"] == sum(
        row["macs"] * row["act_bits"] * row["weight_bits"] for row in layers
    )


def test_without_onnx_one_line_says_so(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="pip install 'onnx.*config.export.onnx=False"):
        onnx_files.qcdq_model(graph)


# The card --------------------------------------------------------------------------------------


def test_the_card_says_what_is_there(graph):
    sizes = {name: len(content) for name, content in bundle.encode(graph).items()}
    counts = {
        "top1": 70.0, "top5": 80.0, "correct": 7, "correct_top5": 8, "examples": 10,
        "reference_correct": 7, "differing": 0,
    }  # fmt: skip
    facts = {"data": "photographs", "pretrained": "w.npz", "licence": "CC0"}
    facts |= {"versions": {"jax": "1"}}
    text = card(graph, sizes | {QCDQ: 1, QONNX: 2}, counts, class_names=(), **facts)
    assert "in the order of the labels of photographs" in text
    named = card(graph, sizes | {QCDQ: 1, QONNX: 2}, counts, class_names=("ant", "bee"), **facts)
    assert "in this order: 0 ant, 1 bee." in named
    assert "top-1 70.00 % (7 correct)" in text and "10 images of\n  photographs" in text
    assert f"{graph.policy['gbops']:.6g} GBOPs" in text
    assert f"{sizes[bundle.WEIGHTS]:,} bytes" in text and "CC0. Initial weights: `w.npz`" in text
    assert all(f"| `{path}` |" in text for path in graph.policy["layers"])
