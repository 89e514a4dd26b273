"""config.model.name=FILE.py:NAME and MODULE:NAME, and the user's mistakes."""

import pytest
from ml_collections import ConfigDict

from metamix_jax import command_line, recipes
from metamix_jax.errors import UserError
from metamix_jax.networks import own, registry
from metamix_jax.networks.precision import QuantSettings
from tests.helpers.config_fields import ROOT

FILE = str(ROOT / "tests/helpers/own_networks.py")
MODULE = "tests.helpers.own_networks"


def make(name, shape=(8, 8, 1), **fields):
    config_model = ConfigDict({"name": name, **fields})
    return registry.make(config_model, 10, QuantSettings(), image_shape=shape)


@pytest.mark.parametrize("place", [FILE, MODULE])
def test_a_network_by_file_or_module(place):
    model = make(f"{place}:Net", width=4)
    assert (model.network.label, model.num_classes) == ("Net", 10)
    assert model.network.module.width == 4
    assert registry.label(ConfigDict({"name": f"{place}:Net"})) == "Net"
    assert not registry.architecture_of(model).torch_names.modules
    assert registry.default_fields(f"{place}:Net") == {"width": 8}
    assert registry.default_fields(f"{place}:NnxNet") == {"width": 8}
    assert registry.default_fields(f"{place}:NeedsWidth") == {"width": None}
    assert own.source_file(f"{place}:Net").samefile(FILE)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("no/such.py:Net", {}, r"config\.model\.name='no/such.py:Net': no such file as no/such.py"),
        ("no_such.nets:Net", {}, "no module 'no_such.nets'; expected FILE.py:NAME, or a module"),
        (f"{MODULE}:Nett", {}, r"has no 'Nett'; did you mean 'Net'\?"),
        (f"{MODULE}:not_a_network", {}, "a int; expected a Linen or NNX class"),
        (f"{MODULE}:conv", {"features": 3}, "needs 'name'; set config.model.name"),
        (f"{MODULE}:NeedsWidth", {}, "needs 'width'; set config.model.width"),
        (f"{MODULE}:Net", {"widht": 3}, r"config\.model\.widht: .* no such argument; did you mean"),
        (
            f"{MODULE}:WrongShape", {},
            r"returns \(2, 8, 8, 10\) for 2 images of \(8, 8, 1\); expected scores of .* \(2, 10\)",
        ),
        (f"{MODULE}:two_momenta", {}, "batch norm with momentum 0.9, 0.99; expected the same"),
    ],
)  # fmt: skip
def test_mistakes(name, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        make(name, **fields)
    assert "\n" not in str(caught.value)


def test_errors_inside_a_file_keep_their_traceback(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        make(f"{path}:Net")


def test_fields_follow_the_network_on_the_command_line():
    config = recipes.load("digits")
    assert "depth" in config.model
    argv = [f"--config.model.name={FILE}:NeedsWidth", "--config.model.width=4"]
    found = command_line._with_network(config, argv)
    assert found.model.to_dict() == {"name": f"{FILE}:NeedsWidth", "width": 4}
    found = command_line._with_network(recipes.load("digits"), ["--config.model.name=resnet18"])
    assert found.model.to_dict() == {"name": "resnet18", "padding": "torch"}
    # The recipe's own network keeps the recipe's fields.
    same = command_line._with_network(config, ["--config.model.name=cifar_resnet"])
    assert same.model.depth == config.model.depth


def test_a_field_that_the_recipe_leaves_out_may_be_given():
    argv = ["--config.model.width=0.5", "--config.model.widht=1"]
    found = command_line._with_network(recipes.load("mbv2"), argv)
    assert found.model.to_dict() == {"name": "mobilenet_v2", "padding": "torch", "width": 1.0}
