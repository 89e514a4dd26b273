"""The files of configs/, their arguments, and overrides on the command line."""

import ast
import re
import subprocess
import sys

import pytest

from metamix_jax import recipes
from metamix_jax.config import default, validate
from metamix_jax.errors import UserError
from metamix_jax.training import setup
from tests.helpers.config_fields import ROOT, change, load

CONFIGS = sorted(ROOT.glob("configs/[!_]*.py"))
# Arguments of the configuration files, in addition to none.
ARGUMENTS = {
    "cifar10_resnet20": [
        f"schedule={schedule},shortcut={shortcut}"
        for schedule in ("gpu", "cpu")
        for shortcut in ("identity", "conv")
    ]
    + [f"schedule={schedule},weight_bits=842" for schedule in ("gpu", "cpu")],
    "resnet18": ["weight_bits=3", "weight_bits=842", "weight_bits=642,act_bits=642,budget=31.1"],
}
CASES = [(path, argument) for path in CONFIGS for argument in ["", *ARGUMENTS.get(path.stem, [])]]


@pytest.fixture
def config():
    """A valid configuration."""
    return load(ROOT / "configs/digits.py")


@pytest.mark.parametrize(
    ("path", "argument"), CASES, ids=lambda value: getattr(value, "stem", value)
)
def test_files_load_validate_and_build_their_network(path, argument):
    config = load(path, argument)
    assert config.is_locked
    validate(config)
    network = setup.make_network(config)
    assert sum(layer.macs for layer in network.costs.values()) > 0
    assert network.label.startswith(config.model.name)
    assert setup.make_schedule(config, train_examples=1000)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_files_open_with_their_command(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert re.search(rf"--config=({path.stem}|configs/{path.name})[ :]", docstring)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("shedule=cpu", r"'shedule=cpu': did you mean 'schedule'\?"),
        ("schedule=tpu", r"expected schedule= .*known: cpu, gpu"),
        ("schedule", r"'schedule': expected schedule="),
    ],
)
def test_mistakes_in_the_argument_of_a_file(argument, message):
    with pytest.raises(UserError, match=message):
        load(ROOT / "configs/cifar10_resnet20.py", argument)


@pytest.mark.parametrize(
    ("name", "argument", "act_bits", "weight_bits"),
    [
        ("digits", "", (8, 4, 2), (4,)),
        ("mbv2", "", (8, 4, 3), (4,)),
        ("cifar10_resnet20", "", (8, 4, 2), (4,)),
        ("cifar10_resnet20", "weight_bits=842", (8, 4, 2), (8, 4, 2)),
        ("resnet18", "", (8, 4, 2), (4,)),
        ("resnet18", "weight_bits=2,act_bits=642", (6, 4, 2), (2,)),
        ("resnet18", "weight_bits=642,act_bits=642", (6, 4, 2), (6, 4, 2)),
    ],
)
def test_bits_of_the_files(name, argument, act_bits, weight_bits):
    config = load(ROOT / f"configs/{name}.py", argument)
    assert (config.quant.act_bits, config.quant.weight_bits) == (act_bits, weight_bits)


@pytest.mark.parametrize("name", ["cifar10_resnet20", "resnet18"])
def test_files_with_searched_weights_quantize_them_from_the_search_to_the_end(name):
    config = load(ROOT / f"configs/{name}.py", "weight_bits=842")
    spans = setup.make_schedule(config, train_examples=50_000)
    phases = ["bit_meta", "bit_search", "weight_training"]
    assert [span.phase.name for span in spans] == phases
    assert [span.phase.name for span in spans if span.phase.quantizes_weights] == phases
    assert [span.calibrates_weights for span in spans] == [True, False, False]


@pytest.mark.parametrize(
    ("act_bits", "weight_bits", "number"),
    [((8, 4), (4,), 2), ((8, 4, 2), (8, 2), 6), ((4,), (8, 4), 2)],
)
def test_bits_reach_every_layer_between_the_ends(act_bits, weight_bits, number, config):
    change(config, "quant.act_bits", act_bits)
    change(config, "quant.weight_bits", weight_bits)
    config.budget.value = 1.0
    first, *searched, last = setup.make_network(config).costs.values()
    for layer in searched:
        assert (layer.act_bits, layer.weight_bits) == (act_bits, weight_bits)
        assert len(layer.candidates) == number
    for layer in (first, last):
        assert (layer.act_bits, layer.weight_bits) == ((8,), (8,))


def test_argument_defaults_to_the_first_value():
    choices = {"schedule": ("gpu", "cpu"), "shortcut": ("identity", "conv")}
    parsed = recipes.parse_argument("shortcut=conv", **choices)
    assert parsed == {"schedule": "gpu", "shortcut": "conv"}


@pytest.mark.parametrize("section", ["", "quant", "bit_search", "data", "optimizer"])
def test_unknown_keys_cannot_be_set(section):
    config = default()
    with pytest.raises((AttributeError, KeyError), match="misspelt"):
        (config[section] if section else config).misspelt = 1


def run_main(*arguments):
    command = [sys.executable, "main.py", "--mode=cost", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.quant.act_bit=8", "config.quant.act_bit: no such configuration key"),
        ("--config.sede=1", "config.sede: no such configuration key; did you mean 'seed'?"),
    ],
)
def test_unknown_keys_in_overrides_are_one_line_errors(override, message, tmp_path):
    done = run_main(override, f"--workdir={tmp_path}/run")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_in_a_file_are_one_line_errors(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from metamix_jax.config import default\n\n"
        "def get_config():\n"
        "    config = default()\n"
        "    config.bit_search.learnin_rate = 1.0\n"
        "    return config\n"
    )
    done = run_main(f"--config={path}", f"--workdir={tmp_path}/run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "learnin_rate: no such configuration key" in done.stderr
    assert "learning_rate" in done.stderr
    assert len(done.stderr.splitlines()) == 1
