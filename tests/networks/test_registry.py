"""A network is one file: the registry is complete, and nothing else lists networks."""

import ast
import dataclasses
import importlib

import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.networks import registry
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.networks.registry import ARCHITECTURES
from metamix_jax.selection.cost import layer_costs
from tests.helpers.config_fields import ROOT
from tests.helpers.export_networks import Pieces, graph_of, quantized

PACKAGE = ROOT / "metamix_jax"
FOLDER = PACKAGE / "networks/zoo"


DRAWN = sorted(name for name, found in ARCHITECTURES.items() if found.draw)
PLAIN = sorted(ARCHITECTURES.keys() - set(DRAWN))  # in plain Flax, exported from their trace


def make(name):
    return registry.make(ConfigDict({"name": name}), 3, QuantSettings(), image_shape=(32, 32, 3))


def test_every_network_of_every_file_is_known():
    modules = [
        importlib.import_module(f"metamix_jax.networks.zoo.{path.stem}")
        for path in FOLDER.glob("[!_]*.py")
    ]
    found = [architecture for module in modules for architecture in module.ARCHITECTURES]
    assert len(modules) > 1 and len(found) == len(ARCHITECTURES)
    for architecture in found:
        assert ARCHITECTURES[architecture.name] is architecture
        assert issubclass(architecture.module, nn.Module)
    assert len({architecture.module for architecture in found}) == len(found)


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_plain_network_offers(name):
    architecture, model = ARCHITECTURES[name], make(name)
    assert type(model.network.module) is architecture.module
    assert registry.architecture_of(model) is architecture
    assert registry.label(ConfigDict({"name": name})) == name
    assert registry.exportable(model) and architecture.torch_names.modules
    with pytest.raises(UserError, match="config.model.padding: .* has no such field"):
        registry.make(ConfigDict({"name": name, "padding": "tf"}), 3, QuantSettings())


@pytest.mark.parametrize("name", DRAWN)
def test_what_a_network_offers(name):
    architecture, model = ARCHITECTURES[name], make(name)
    assert type(model) is architecture.module
    assert registry.architecture_of(model) is architecture
    assert registry.label(ConfigDict({"name": name})) == name
    assert 0 < architecture.module.bn_momentum < 1
    assert callable(architecture.draw) and architecture.torch_names.modules
    if architecture.shortcut is not None and name != "cifar_resnet":  # its shortcut is optional
        paths = layer_costs(model, (33, 33, 3))
        assert any(path.endswith(f"/{architecture.shortcut}") for path in paths)


@pytest.mark.parametrize("name", sorted(set(DRAWN) - {"cifar_resnet"}))
def test_an_unknown_padding_is_refused(name):
    with pytest.raises(UserError, match="config.model.padding='same': expected torch or tf"):
        registry.make(ConfigDict({"name": name, "padding": "same"}), 3, QuantSettings())


def test_a_network_that_nobody_drew_is_not_exported(monkeypatch):
    plain = {"pieces": registry.Architecture("pieces", Pieces)}
    monkeypatch.setattr(registry, "ARCHITECTURES", ARCHITECTURES | plain)
    network = quantized(Pieces(3, QuantSettings()), (9, 9, 3))
    with pytest.raises(UserError, match="config.model.name='pieces': cannot be exported"):
        graph_of(network)


def test_no_other_module_knows_networks_by_name():
    names = {*ARCHITECTURES, *(found.module.__name__ for found in ARCHITECTURES.values())}
    names |= {found.shortcut for found in ARCHITECTURES.values()} - {None}
    recipes = PACKAGE / "recipes.py"  # names the paper's teacher
    for path in PACKAGE.rglob("*.py"):
        if FOLDER in path.parents or path == recipes:
            continue
        tree = ast.parse(path.read_text())
        found = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        found |= {node.name for node in ast.walk(tree) if isinstance(node, ast.alias)}
        assert not found & names, f"{path}: {found & names}"


def test_networks_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ARCHITECTURES["resnet18"].draw = None
