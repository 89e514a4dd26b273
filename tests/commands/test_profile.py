"""--mode=profile, and budgets in the milliseconds that it measured."""

import csv
import pathlib

import pytest

from metamix_jax import commands, recipes
from metamix_jax.errors import UserError
from metamix_jax.training import setup

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def config():
    return recipes.load_config("digits", **{"profile.rounds": 2})


@pytest.fixture(scope="module")
def profile(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("profile")
    return commands.run_mode("profile", config, workdir)


def test_every_layer_at_every_candidate(config, profile):
    with pathlib.Path(profile["table"]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    _, costs = setup.make_model(config)
    found = [(row["layer"], row["act_bits"], row["weight_bits"]) for row in rows]
    expected = [
        (path, str(bits.act), str(bits.weight))
        for path, layer in costs.items() for bits in layer.candidates
    ]  # fmt: skip
    assert found == [*expected, ("rest", "", "")]
    assert all(float(row["milliseconds"]) >= 0 for row in rows)
    assert profile["milliseconds"].keys() == {"8/4", "4/4", "2/4"}


def test_the_table_is_a_budget(config, profile, capsys, tmp_path):
    own = config.copy_and_resolve_references()
    own.budget.latencies = profile["table"]
    commands.run_mode("cost", own, tmp_path)
    assert "ms an image" in capsys.readouterr().out
    own.budget.limits = ("milliseconds=1000",)
    network = setup.make_network(own)
    (limit,) = network.budget.further
    assert limit.cost_model.unit == "ms" and limit.limit == limit.cost_model.most
    own.budget.latencies = str(tmp_path / "gone.csv")
    with pytest.raises(UserError, match="budget.latencies=.*gone.csv.*cannot be read"):
        setup.make_network(own)
    assert setup.make_network(own, searches=False).budget is None  # to read a finished run
    own.budget.latencies = profile["table"]
    own.budget.limits = ("milliseconds=0.0000001",)
    with pytest.raises(UserError, match="budget.limits=1e-07 .milliseconds. .*nearest feasible"):
        setup.make_network(own)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget.unit": "milliseconds"}, "budget.latencies='': expected a table with budget.unit"),
        ({"budget.limits": ("fraction=0.5",)}, "budget.limits=.* units other than"),
        ({"budget.limits": ("mebibytes=0.5",)}, "quant.weight_bits=.*two or more with"),
        ({"budget.limits": ("gbops",)}, "limits UNIT=VALUE, each unit once"),
    ],
)
def test_mistakes(config, fields, message):
    own = config.copy_and_resolve_references()
    own.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        setup.make_network(own)


def test_attention_is_measured_too(config, tmp_path):
    own = config.copy_and_resolve_references()
    own.model = {"name": "tests.helpers.own_networks:Attending"}
    own.quant.act_bits = (8, 4)
    found = commands.run_mode("profile", own, tmp_path)
    with pathlib.Path(found["table"]).open(encoding="utf-8", newline="") as file:
        layers = {row["layer"]: float(row["milliseconds"]) for row in csv.DictReader(file)}
    assert set(layers) == {"queries", "keys", "product1", "product2", "head", "rest"}
    assert max(layers["product1"], layers["queries"]) > 0


def test_without_onnxruntime_it_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="measures network.int8.onnx, but .*metamix_jax.export"):
        commands.run_mode("profile", config, tmp_path)
