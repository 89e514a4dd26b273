"""Which layer a kernel belongs to, and that all of them add up to the whole."""

import json
from pathlib import Path

import numpy as np
import pytest

from metamix_jax.exporters import integer_plan, integer_runtime, layer_times
from metamix_jax.exporters.graph import IMAGE
from metamix_jax.exporters.layer_times import WARM_UP, _attributed, _kernels, _owners, owner
from metamix_jax.networks.precision import QuantSettings
from tests.helpers.export_networks import (
    calibrated,
    graph_of,
    intercepted,
    pieces,
    quantized,
    random_images,
)

pytest.importorskip("onnxruntime")

SHAPE = (11, 9, 3)
SETTINGS = QuantSettings(act_bits=(8, 4), weight_bits=(4,))


@pytest.fixture(scope="module")
def graph():
    return graph_of(quantized(pieces(SETTINGS, SHAPE), SHAPE))


def test_whose_a_kernel_is(graph):
    owners = _owners(integer_plan.fold(graph.nodes))
    expected = {
        "relu6/real/Conv_token_5": "grouped",
        "grouped/input/same/LeakyRelu": "grouped",
        "add/real/Add": "",
        "add/levels/Clip": "depthwise",  # the width of the layer that takes it
        "relu6/levels/Clip": "grouped",  # taken by several
        "depthwise_bn/real/Conv_token_9": "depthwise",
        "hswish_2/gate/same/LeakyRelu": "",
        "fc/real/Gemm": "fc",
        "fc_other/real/Gemm": "",
        "Transpose_token_3": "",
        "image/levels/wide/QuantizeLinear": "stem",
    }
    assert {name: owner(name, owners) for name in expected} == expected


def test_all_runs_of_a_layer_are_its_own():
    settings = QuantSettings(act_bits=(8, 4), weight_bits=(4,))
    shape = (9, 9, 1)
    network = calibrated(intercepted("Net", settings, shape), random_images(shape))
    steps = integer_plan.fold(graph_of(network).nodes)
    owners = _owners(steps)
    for kernel in ("Block_0/Conv_0@2/product/Conv", "Block_0/Conv_0/input/levels/Clip"):
        assert owner(kernel, owners) == "Block_0/Conv_0"
    kernels = {f"Block_0/Conv_0{run}/product/Conv": [20.0] for run in ("", "@2")}
    found = _attributed(kernels | {"Dense_0/product/Gemm": [10.0]}, steps, 0.05)
    assert found.layers["Block_0/Conv_0"] == pytest.approx(0.04)
    assert not any("@" in name for name in found.layers)


def test_what_reading_the_clock_takes_is_taken_off(graph):
    """Kernels of 10, 4 and 4 microseconds, each read as 2 more; the whole takes 0.018 ms."""
    kernels = {
        "relu6/real/Conv": [12.0, 11.0, 13.0], "fc/real/Gemm": [6.0] * 3, "add/real/Add": [6.0] * 3,
    }  # fmt: skip
    found = _attributed(kernels, integer_plan.fold(graph.nodes), 0.018)
    assert found.layers["grouped"] == pytest.approx(0.010)
    assert found.layers["fc"] == pytest.approx(0.004)
    assert found.rest == pytest.approx(0.004) and found.whole == 0.018
    assert found.spread["grouped"] == pytest.approx(0.0005)
    assert found.layers["stem"] == 0


def test_kernels_are_read_from_a_profile(tmp_path):
    events = [{"cat": "Session", "name": "model_run", "dur": 99}]
    for duration in (50, 40, 3, 4):
        events += [
            {"cat": "Node", "name": "a/real/Conv_kernel_time", "dur": duration},
            {"cat": "Node", "name": "a/real/Conv_fence_before", "dur": 1},
        ]
    (tmp_path / "profile.json").write_text(json.dumps(events))
    assert _kernels(tmp_path / "profile.json") == {"a/real/Conv": [3, 4]} and WARM_UP == 2


def test_every_layer_has_its_kernel_in_a_real_profile(graph, tmp_path):
    content = integer_runtime.integer_files(graph, np.zeros((2, *SHAPE), np.uint8))[0]
    run = integer_runtime.session(content, profile=str(tmp_path / "profile"))
    for _ in range(WARM_UP + 1):
        run.run(None, {IMAGE: np.zeros((1, SHAPE[2], *SHAPE[:2]), np.float32)})
    kernels = _kernels(Path(run.end_profiling()))
    owners = _owners(integer_plan.fold(graph.nodes))
    found = [owner(name, owners) for name in kernels if "/real/Conv" in name or "/Gemm" in name]
    assert sorted(found) == sorted(node.name for node in graph.layers)
    assert all(len(times) == 1 for times in kernels.values())


def test_times_are_of_every_layer(graph):
    files = {"one": integer_runtime.integer_files(graph, np.zeros((2, *SHAPE), np.uint8))[0]}
    found = layer_times.layer_times({"one": graph}, files, rounds=3, batch_size=2, threads=1)["one"]
    assert list(found.layers) == [node.name for node in graph.layers]
    assert found.whole > 0 and sum(found.layers.values()) > 0
