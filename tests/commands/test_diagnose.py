"""Diagnoses: probes, the states compared and the whole mode."""

import functools
import json

import jax
import matplotlib.image
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from metamix_jax.commands.diagnose import diagnosis, probes, states, statistics
from metamix_jax.errors import UserError
from metamix_jax.networks.precision import FULL, Bits, Precision, QuantSettings
from metamix_jax.report import diagnostic_charts, diagnostic_tables
from metamix_jax.selection import cost, phases
from metamix_jax.selection import policy as policy_lib
from metamix_jax.selection.searchers import hessian
from metamix_jax.training import setup
from metamix_jax.training.checkpoints import DIRECTORY, Checkpoints, locate
from metamix_jax.training.schedule import make_spans
from metamix_jax.training.step.batch_step import training_images
from tests.helpers.quant_layers import QuantConv
from tests.helpers.tiny_network import (
    BITS,
    calibrated_state,
    compiled,
    fresh_state,
    make_batch,
    make_config,
)

LAYER = "layer2_0/conv1"  # searched
QUICK = {"xla_backend_optimization_level": 0}  # compilation dominates test time
MIDDLE = "layer2_0/downsample_conv"  # of the searched ones


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def network(config):
    return setup.make_network(config)


@pytest.fixture(scope="module")
def variables(config, network):
    return calibrated_state(config, network, make_batch()).variables


# Probes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "calibrate", "mixture", 1])
def test_the_hook_keeps_exactly_the_quantizers_input(mode):
    layer = QuantConv(2, QuantSettings(act_bits=BITS))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    variables = layer.init({"params": jax.random.key(0), "quant": jax.random.key(0)}, x)
    assert set(variables) == {"params", "quant", "costs"}
    forward = Precision(activations=mode)
    y, kept = layer.apply(variables, x, forward, mutable=["intermediates", "quant"])
    assert jax.tree.leaves(kept["intermediates"])[0].tobytes() == x.tobytes()
    assert set(flatten_dict(kept["intermediates"])) == {("quantizer_input",)}
    plain, moved = layer.apply(variables, x, forward, mutable=["quant"])
    assert set(moved) == {"quant"}
    assert plain.tobytes() == y.tobytes()


def test_samples_are_the_inputs_of_every_layer(config, network, variables):
    batch = make_batch(seed=1)
    sample = probes.make_sampler(network.model, config, tuple(network.costs), train=True)
    found = sample(variables, batch, FULL)
    assert list(found) == sorted(network.costs)
    images = np.asarray(training_images(batch, config))
    # The image has fewer values than a sample, so all are sampled.
    np.testing.assert_allclose(np.sort(found["conv1"]), np.sort(images, axis=None), rtol=1e-5)
    assert found["layer1_0/conv1"].shape == (min(probes.SAMPLES, 16 * 8 * 8 * 4),)
    assert found["layer1_0/conv1"].min() == 0.0


def test_batch_norms_follow_their_layers():
    for name, without in (
        ("cifar_resnet", {"fc"}),
        ("mobilenet_v2", {"classifier"}),
        ("mobilenet_v3_large", {"se_fc1", "se_fc2", "classifier1", "classifier2"}),
    ):
        network = setup.make_network(
            make_config(**{"model": {"name": name}, "data.channels": 1, "data.image_size": 32})
        )
        batch_stats = setup.abstract_variables(network)["batch_stats"]
        found = {path: probes.norm_after(path, batch_stats) for path in network.costs}
        assert {path.split("/")[-1] for path, norm in found.items() if norm is None} == without
        norms = [norm for norm in found.values() if norm]
        known = {path.rpartition("/")[0] for path in flatten_dict(batch_stats, sep="/")}
        assert sorted(norms) == sorted(known)  # each exactly once


def test_batch_variance_is_that_of_the_layers_output(config, network, variables):
    batch, norm = make_batch(seed=1), probes.norm_after(LAYER, variables["batch_stats"])
    variance = probes.make_batch_variance(network.model, config, norm)

    @compiled
    def outputs(forward):
        _, kept = network.model.apply(
            variables, training_images(batch, config), train=True, precision=forward,
            capture_intermediates=True, mutable=["batch_stats", "intermediates"],
        )  # fmt: skip
        return kept["intermediates"]["layer2_0"]["conv1"]["__call__"][0]

    found = []
    for act in BITS:
        forward = probes.precision_at(network.costs, max(BITS), 4, own=(LAYER, act))
        found.append(variance(variables, batch, forward))
        expected = np.var(np.float64(outputs(forward)), axis=(0, 1, 2))
        np.testing.assert_allclose(found[-1], expected, rtol=1e-3, atol=1e-6)
    assert not np.allclose(*found, rtol=1e-2)


def test_precision_at_uniform_widths(network):
    found = probes.precision_at(network.costs, 8, None, own=(LAYER, 2))
    assert (found.activations, found.weights) == ("chosen", "full")
    assert {path for path, branch in found.branches.items() if branch == 1} == {LAYER}
    assert probes.precision_at(network.costs, 8, 4).weights == "quantized"


def test_pick_layer(network):
    assert probes.pick_layer("", network.costs) == MIDDLE
    assert probes.pick_layer(LAYER, network.costs) == LAYER
    for name in ("layer2_0/conv", "fc"):
        with pytest.raises(UserError, match="diagnose.layer"):
            probes.pick_layer(name, network.costs)


# The states compared ---------------------------------------------------------------------------


def schedule_of(**epochs):
    config = make_config(**{f"{name}.epochs": value for name, value in epochs.items()})
    rows = (phases.full_precision, phases.bit_meta, phases.bit_search, phases.weight_training)
    return make_spans([row(config) for row in rows], steps_per_epoch=10)


def test_the_meta_state_is_preferred_to_what_came_later():
    schedule = schedule_of(full_precision=1, bit_meta=1, bit_search=1)  # to 10, 20, 30; then 120
    assert states.newest_of_search([5, 15, 30, 100], schedule) == 30
    assert states.newest_of_search([5, 15], schedule) == 15
    assert states.newest_of_search([100, 150], schedule) == 150
    assert states.newest_of_search([5, 10], schedule) == 10
    found = [states.phase_of(step, schedule) for step in (0, 10, 11, 30, 31)]
    assert found == ["start", "full_precision", "bit_meta", "bit_search", "weight_training"]


def test_locate(tmp_path):
    folder = tmp_path / DIRECTORY
    for path, step in ((tmp_path, None), (folder, None), (folder / "12", 12)):
        assert locate(path) == (folder, step)
    assert locate(tmp_path / "12") == (tmp_path / "12" / DIRECTORY, None)


# The mode --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diagnosed(config, network, tmp_path_factory):
    """A workdir with a checkpoint and its diagnosis, the RESULT and diagnostics.json."""
    workdir = tmp_path_factory.mktemp("diagnosed")
    span = setup.make_schedule(config, 1437)[0]
    state = setup.enter_phase(fresh_state(config, network), span, config)
    for folder in (workdir, workdir / "before"):
        with Checkpoints(folder / DIRECTORY, create=True) as checkpoints:
            checkpoints.save(0, state, {"model": network.label, "policy": None, "seconds": {}})
    overrides = {"diagnose.before": str(workdir / "before"), "diagnose.batches": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        patch.setattr(probes, "STATISTICS", ("running",))  # fewer programs to compile
        result = diagnosis.measure(make_config(**overrides), workdir)
    return workdir, result, json.loads((workdir / "diagnostics.json").read_text())


def test_the_same_weights_are_as_far_apart_after_as_before(diagnosed):
    _, result, found = diagnosed
    assert result["states"]["after"]["phase"] == "start"
    assert result["layer"] == found["layer"] == MIDDLE
    assert [row["weights"] for row in found["summary"]] == ["full", "4-bit"]
    for row in found["summary"]:
        assert row["before"] == row["after"] > 0
        assert (row["closer"], row["layers"]) == (0, 7)  # 8 searched; the first has equal inputs
    assert found["variance_traces"]["before"] == found["variance_traces"]["after"]
    assert found["sensitivity"] is None


def test_files_of_a_diagnosis(diagnosed):
    workdir, _, found = diagnosed
    names = {"activations", "distances", "variance", "gaussian"}
    assert {path.stem for path in workdir.glob("*.png")} == {f"diagnose_{name}" for name in names}
    for path in workdir.glob("*.png"):
        assert matplotlib.image.imread(path).min() < 0.1
    density = np.array(found["histograms"]["density"]["before"]["full"]["8"])
    mass = density @ np.diff(found["histograms"]["edges"]["before"])
    assert 0.99 < mass <= 1 + 1e-6
    text = diagnostic_tables.all_tables(found)  # also works on the file's content
    assert "layer3_0/conv2" in text


def test_charts_and_tables_of_one_state_and_of_a_policy(diagnosed, tmp_path):
    found = dict(diagnosed[2])
    for name in ("distances", "histograms"):
        found[name] = {
            kind: {"after": rows["after"]} if "after" in rows else rows
            for kind, rows in found[name].items()
        }
    found["variance_traces"] = {"after": found["variance_traces"]["after"]}
    for row in found["summary"]:
        row.update(before=None, closer=None, layers=None)
    found["sensitivity"] = statistics.sensitivity(
        {"a": 8, "b": 2}, {"a": 5, "b": 9}, {"a": 1, "b": 1}
    )
    diagnostic_charts.draw_all(found, tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert "operations (MACs)" in diagnostic_tables.all_tables(found)


def test_bits_are_set_against_traces_of_the_hessian(network, variables, tmp_path, monkeypatch):
    bits = cost.uniform_bits(network.costs, 2) | {LAYER: Bits(8, 4)}
    policy = policy_lib.make_policy(
        network.costs, bits, model=network.label, image_size=8, searcher="file", seed=0,
        budget_gbops=None,
    )  # fmt: skip
    policy_lib.write_policy(tmp_path / "policy.json", policy)
    monkeypatch.setattr(hessian, "PROBES", 1)
    found = diagnosis._sensitivity(
        make_config(**{"diagnose.hessian": True}), tmp_path, network,
        states.State(variables, {}), [make_batch()],
    )  # fmt: skip
    rows = found["layers"]
    assert rows[LAYER]["act_bits"] == 8
    assert all(np.isfinite(row["trace"]) and row["trace"] != 0 for row in rows.values())
    assert -1 <= found["spearman"]["trace"] <= 1


def test_without_any_weights(config, tmp_path):
    with pytest.raises(UserError, match="expected trained weights"):
        diagnosis.measure(config, tmp_path)
    assert not list(tmp_path.iterdir())
