"""metamix_jax as a library, and the modes that export a checkpoint and evaluate a bundle."""

import dataclasses
import importlib.util
import inspect
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metamix_jax
from metamix_jax import command_line, commands, recipes
from metamix_jax.data import datasets
from metamix_jax.errors import UserError
from metamix_jax.exporters import bundle, card, integer_runtime, onnx_reader, quantized_network
from metamix_jax.exporters import exported as exported_files
from metamix_jax.selection import policy
from metamix_jax.training import setup
from metamix_jax.training.checkpoints import DIRECTORY, Checkpoints
from metamix_jax.training.step.state import TrainState
from tests.helpers.export_networks import quantized
from tests.helpers.tiny_network import compiled, make_config

EXAMPLES = 70  # of 360; not a multiple of the executor's batch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a configuration, its network and a workdir with the last checkpoint of a run."""
    pytest.importorskip("onnx")
    pytest.importorskip("ai_edge_litert")
    config = make_config(
        **{"export.examples": EXAMPLES, "eval.bn_reestimate_batches": 1, "export.litert": True}
    )
    network = setup.make_network(config)
    found = quantized(network.model, network.image_shape)
    state = TrainState(step=jnp.int32(0), rng=jax.random.key(0), **found.variables)
    chosen = policy.make_policy(
        network.costs, found.policy.bits, model=network.label,
        image_size=8, searcher="file", seed=0, budget_gbops=network.budget_gbops,
    )  # fmt: skip
    workdir = tmp_path_factory.mktemp("run")
    (workdir / "config.json").write_text(config.to_json())
    policy.write_policy(workdir / "policy.json", chosen)
    stop = setup.make_schedule(config, 1437)[-1].stop
    with Checkpoints(workdir / DIRECTORY, create=True) as checkpoints:
        facts = {"model": network.label, "policy": chosen.to_json(), "seconds": {}}
        checkpoints.save(1, state, facts)
        checkpoints.save(stop, state, facts)
    return config, network, workdir


@pytest.fixture(scope="module")
def exported(run):
    config, _, workdir = run
    return commands.run_mode("export", config, workdir), workdir / exported_files.EXPORT_DIRECTORY


def test_mode_export(run, exported):
    config, network, _ = run
    result, directory = exported
    json.dumps(result)
    assert result["mode"] == "export" and result["model"] == network.label
    assert result["examples"] == EXAMPLES and result["differing"] == 0
    assert result["correct"] == result["reference_correct"]
    names = {
        *bundle.FILES, card.QCDQ, card.QONNX, card.INT8, card.INT4, card.LITERT, card.STABLEHLO,
    }  # fmt: skip
    assert result["files"].keys() == names
    assert {path.name for path in directory.iterdir()} == names | {"README.md"}
    for name, size in result["files"].items():
        assert (directory / name).stat().st_size == size
    text = (directory / "README.md").read_text()
    assert f"({result['correct']} correct)" in text
    integer = result["integer"]
    assert integer["examples"] == EXAMPLES and integer["in_float"] == {}
    assert f"({integer['correct']} of {EXAMPLES})" in text and f"| `{card.INT4}` |" in text
    mobile = result["litert"]
    assert mobile["examples"] == EXAMPLES and mobile["milliseconds"] > 0
    assert f"({mobile['correct']} of {EXAMPLES})" in text
    assert integer["milliseconds"].keys() == {"float32", card.QCDQ, card.INT8, card.INT4}


def test_mode_evaluate_accepts_a_bundle(run, exported):
    config = run[0].copy_and_resolve_references()
    config.checkpoint = str(exported[1])
    found = commands.run_mode("evaluate", config, run[2])
    assert found["mode"] == "evaluate" and found["correct"] == exported[0]["correct"]
    config.data.channels = 3
    with pytest.raises(UserError, match="takes images of"):
        exported_files.evaluate_exported(config, exported[1])


def test_ranges_are_those_of_training_images(run, tmp_path, monkeypatch):
    """As many as the configuration says, from all over the split."""
    seen = []

    def integer_files(graph, pixels):
        seen.append(pixels)
        return b"", b""

    monkeypatch.setattr(integer_runtime, "integer_files", integer_files)
    config, network, _ = run
    dataset = datasets.load(config.data)
    chosen = policy.load_policy(run[2] / "policy.json")
    found = quantized(network.model, network.image_shape)
    found = dataclasses.replace(found, config=config, network=network, policy=chosen)
    with pytest.raises(UserError, match="damaged"):  # no file at all
        exported_files.export(found, tmp_path)
    (pixels,) = seen
    known = [{each.tobytes() for each in split.gather(np.arange(len(split)))[0]}
             for split in (dataset.train, dataset.evaluation)]  # fmt: skip
    assert len(pixels) == config.export.calibration_images == 128
    given = {each.tobytes() for each in pixels}
    assert given <= known[0] and not given <= known[1]
    first = {each.tobytes() for each in dataset.train.gather(np.arange(128))[0]}
    assert len(given & first) < 64


@pytest.mark.parametrize("name", [card.INT8, card.INT4, card.QCDQ, card.LITERT])
def test_mode_evaluate_accepts_a_single_file(name, run, exported):
    config = run[0].copy_and_resolve_references()
    config.checkpoint = str(exported[1] / name)
    found = commands.run_mode("evaluate", config, run[2])
    forms = {card.QCDQ: exported[0], card.LITERT: exported[0]["litert"]}
    counts, kind = forms.get(name, exported[0]["integer"]), name.rpartition(".")[2]
    assert found[{"onnx": "onnx", "tflite": "litert"}[kind]] == config.checkpoint
    assert found["examples"] == EXAMPLES
    assert found["correct"] == counts["correct"]
    config.data.num_classes = 11
    with pytest.raises(UserError, match="takes images of"):
        exported_files.evaluate_exported(config, exported[1] / name)


def test_damaged_and_foreign_onnx_files_are_refused(exported, tmp_path):
    content = (exported[1] / card.INT8).read_bytes()
    path, generator = tmp_path / "network.onnx", np.random.default_rng(0)
    damaged = [b"", b"text", content[:-1000], content[: len(content) // 2]]
    for place in generator.integers(0, len(content), 60):
        damaged.append(bytearray(content))
        damaged[-1][place] ^= 1 << generator.integers(8)
    refused = 0
    for each in damaged:
        path.write_bytes(each)
        try:
            onnx_reader.read(path)
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert refused == len(damaged)
    model = pytest.importorskip("onnx").load_model_from_string(content)
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="damaged, or not written by --mode=export"):
        onnx_reader.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        onnx_reader.read(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="onnxruntime does not run it"):
        onnx_reader.read(exported[1] / card.QONNX)


def test_a_damaged_bundle_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, capsys):
    config = run[0].copy_and_resolve_references()
    config.checkpoint = str(tmp_path)
    (tmp_path / bundle.GRAPH).write_text("{}")
    for name in (bundle.WEIGHTS, bundle.SCALES):
        (tmp_path / name).write_bytes(b"")
    flags = types.SimpleNamespace(config=config, workdir=str(run[2]), mode="evaluate")
    monkeypatch.setattr(command_line.flags, "FLAGS", flags)
    assert command_line.main([]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"error: {tmp_path}/graph.json: damaged or not part of a bundle")


def test_a_checkpoint_whose_weights_are_not_quantized_is_refused(run):
    config = run[0].copy_and_resolve_references()
    config.checkpoint = str(run[2] / DIRECTORY / "1")
    with pytest.raises(UserError, match="of phase full_precision, whose weights are not quantized"):
        quantized_network.restore(config, run[2])


def test_a_finished_run_from_a_notebook(run, exported, tmp_path):
    _, _, workdir = run
    chosen = metamix_jax.load_policy(workdir)
    assert chosen == metamix_jax.load_policy(workdir / "policy.json")
    found = metamix_jax.export(workdir, tmp_path / "again")
    for name in bundle.FILES:
        assert (tmp_path / "again" / name).read_bytes() == (exported[1] / name).read_bytes()
    assert found["files"].keys() == exported[0]["files"].keys()


def test_weights_and_a_policy_from_a_notebook(run, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "jit", compiled)
    config, chosen = run[0].copy_and_resolve_references(), metamix_jax.load_policy(run[2])
    with pytest.raises(UserError, match="expected a weight file or a workdir"):
        metamix_jax.quantize(config, chosen)
    config.pretrained, config.eval.bn_reestimate_batches = str(run[2]), 0
    config.export.onnx, config.export.examples = False, 360
    network = metamix_jax.quantize(config, chosen)
    counts = metamix_jax.evaluate(network)
    found = metamix_jax.export(network, tmp_path)
    assert found["files"].keys() == {*bundle.FILES, card.LITERT, card.STABLEHLO}
    assert found["reference_correct"] == counts["correct"] and counts["examples"] == 360


def test_functions_of_the_package_have_their_signatures():
    for name in ("evaluate", "export"):
        assert importlib.util.find_spec(f"metamix_jax.{name}") is None
        assert list(inspect.signature(getattr(metamix_jax, name)).parameters)[0] == "source"
    assert metamix_jax.quantize is quantized_network.quantize
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        metamix_jax.nothing  # noqa: B018


def test_what_is_no_workdir_or_policy(tmp_path):
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}: no workdir"):
        metamix_jax.evaluate(tmp_path)
    (tmp_path / "policy.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="expected a policy of format 1"):
        metamix_jax.load_policy(tmp_path)


def test_a_configuration_comes_back_from_its_workdir(run):
    config, _, workdir = run
    found = recipes.from_workdir(workdir)
    assert json.loads(found.to_json()) == json.loads(config.to_json())
    assert found.is_locked and found.quant.act_bits == config.quant.act_bits


def test_graph_holds_the_checkpoints_weights(run):
    config, _, workdir = run
    network = quantized_network.restore(config, workdir)
    graph = network.graph()
    kernel = np.asarray(network.variables["params"]["fc"]["kernel"])
    node = graph.layers[-1]
    step = np.asarray(network.variables["quant"]["fc"]["weight_step"])[0]
    assert np.array_equal(node.kernel.levels, np.rint(np.clip(kernel / step, -127, 127)))
