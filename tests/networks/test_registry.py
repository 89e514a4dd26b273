"""A network is one file: the registry is complete, and nothing else lists networks."""

import ast
import dataclasses
import importlib

import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.networks import registry
from metamix_jax.networks.registry import ARCHITECTURES
from tests.helpers import zoo
from tests.helpers.config_fields import ROOT

PACKAGE = ROOT / "metamix_jax"
FOLDER = PACKAGE / "networks/zoo"


def make(name, **fields):
    return zoo.make(name, classes=3, **fields)


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


# These have the code of others.
ALIKE = {"resnet34", "resnet50", "resnet101", "mobilenet_v3_large", "deit_tiny"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name
        for name in sorted(ARCHITECTURES)
    ],
)
def test_what_a_network_offers(name):
    architecture, model = ARCHITECTURES[name], make(name)
    assert type(model.network.module) is architecture.module
    assert registry.architecture_of(model) is architecture
    assert registry.label(ConfigDict({"name": name})) == name
    assert 0 < model.bn_momentum < 1 and architecture.torch_names.modules
    if architecture.shortcut is not None and name != "cifar_resnet":  # its shortcut is optional
        paths = zoo.layer_costs(name, classes=3)
        assert any(path.endswith(f"/{architecture.shortcut}") for path in paths)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"cifar_resnet"}))
def test_an_unknown_padding_is_refused(name):
    message = {True: "'same': expected torch or tf", False: f": {name} has no such field"}
    padded = "padding" in {field.name for field in dataclasses.fields(ARCHITECTURES[name].module)}
    with pytest.raises(UserError, match=f"config.model.padding.*{message[padded]}"):
        make(name, padding="same")


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
        ARCHITECTURES["resnet18"].shortcut = None
