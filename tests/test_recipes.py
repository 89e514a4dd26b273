"""Configurations by name, from files and from workdirs, on the command line and from Python."""

import json
import os
import subprocess
import sys

import pytest

import metamix_jax
from metamix_jax import command_line, recipes
from metamix_jax.errors import UserError
from tests.helpers.config_fields import ROOT

FILE = """\
from metamix_jax.config import default

def get_config(argument="none"):
    config = default()
    config.checkpoint = argument
    return config
"""


def test_names_are_those_of_the_files():
    assert recipes.names() == tuple(path.stem for path in sorted(ROOT.glob("configs/*.py")))
    assert "digits" in recipes.names()


@pytest.mark.parametrize("name", recipes.names())
def test_a_name_is_its_file(name):
    config = metamix_jax.load_config(name)
    assert config.is_locked
    assert config.to_json() == metamix_jax.load_config(ROOT / f"configs/{name}.py").to_json()


def test_arguments_follow_a_colon(tmp_path):
    assert metamix_jax.load_config("resnet18:weight_bits=3").quant.weight_bits == (3,)
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    assert metamix_jax.load_config(path).checkpoint == "none"
    assert metamix_jax.load_config(f"{path}:a=1,b:c").checkpoint == "a=1,b:c"


def test_changes():
    config = metamix_jax.load_config(
        "digits", budget=1, seed=3, bit_search={"epochs": 2, "alternate": False},
        model={"name": "resnet18"}, **{"quant.act_bits": [8, 2], "bit_meta.epochs": 3},
    )  # fmt: skip
    assert (config.budget.value, config.seed) == (1.0, 3)
    assert (config.bit_search.epochs, config.bit_search.alternate) == (2.0, False)
    assert (
        config.bit_search.learning_rate
        == metamix_jax.load_config("digits").bit_search.learning_rate
    )
    assert config.model.to_dict() == {"name": "resnet18"}
    assert config.quant.act_bits == (8, 2) and config.bit_meta.epochs == 3.0
    assert config.is_locked


def test_fields_as_text():
    texts = ["seed=3", "pretrained=a=b.npz", "data.mean=(0.5,)", "model={'depth': 14}", "loss="]
    assert recipes.parse_fields(texts) == {
        "seed": 3, "pretrained": "a=b.npz", "data.mean": (0.5,), "model": {"depth": 14}, "loss": "",
    }  # fmt: skip
    with pytest.raises(UserError, match="'seed': expected FIELD=VALUE"):
        recipes.parse_fields(["seed"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sede": 1}, r"config\.sede: no such configuration key; did you mean 'seed'\?"),
        ({"quant": {"act_bit": 8}}, r"config\.quant\.act_bit: .*'act_bits'"),
        ({"budget.values": 1}, r"config\.budget\.values: .*'value'"),
        ({"model.dept": 8}, r"config\.model\.dept: .*'depth'"),
        ({"seed": "x"}, r"config\.seed='x': expected a value such as 0"),
        ({"seed": 1.5}, r"config\.seed=1\.5: expected a value such as 0"),
        ({"budget": "much"}, r"config\.budget\.value='much': expected a value such as 0\.9"),
        ({"quant": 8}, r"config\.quant=8: expected a dictionary"),
        ({"export.onnx": "yes"}, r"config\.export\.onnx='yes': expected a value such as True"),
        ({"seed": {"x": 1}}, r"config\.seed={'x': 1}: expected a value such as 0"),
    ],
)
def test_mistakes_in_changes(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        metamix_jax.load_config("digits", **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("digit", "configuration 'digit': no such recipe, file or workdir; did you mean 'digits'"),
        ("configs/digit.py", "'configs/digit.py': no such .*'digits'"),
        ("", "configuration '': no such .*known: .*digits"),
        ("digits:fast", "configuration 'digits': expected no argument"),
        ("resnet18:weight_bits=9", "recipe argument 'weight_bits=9': expected weight_bits="),
        ("Makefile", "configuration 'Makefile': expected a recipe, a .py file or a workdir"),
        ("tests", "tests: no workdir with a readable config.json"),
    ],
)
def test_what_is_no_configuration(recipe, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message) as caught:
        recipes.load(recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "expected a function get_config"),
        ("def get_config(): pass", "get_config returned NoneType, expected the ConfigDict from"),
        ("def get_config(size): pass", "'mine': expected an argument, after a colon"),
        (
            FILE.replace("config.checkpoint", "config.batchsize"),
            r"mine.py sets batchsize: no such configuration key; did you mean 'batch_size'\?",
        ),
        (
            FILE.replace("config.checkpoint", "config.quant['zzz']"),
            "mine.py sets zzz: no such configuration key; see docs/CONFIG.md",
        ),
    ],
)
def test_mistakes_in_a_file(text, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        recipes.load(path)
    assert "\n" not in str(caught.value)


def test_a_bug_in_a_file_keeps_its_traceback(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    return None.seed")
    with pytest.raises(AttributeError, match="NoneType"):
        recipes.load(path)
    path.write_text("def (")
    with pytest.raises(SyntaxError):
        recipes.load(path)


def test_a_file_may_define_dataclasses(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Size:\n    width: int = 3\n" + FILE
    )
    assert recipes.load(path).is_locked


def test_a_run_is_a_configuration(tmp_path):
    config = metamix_jax.load_config("digits", seed=5, **{"model.depth": 14})
    (tmp_path / "config.json").write_text(config.to_json())
    found = metamix_jax.load_config(tmp_path, budget=0.7)
    assert found.budget.value == 0.7 and found.is_locked
    found.budget.value = config.budget.value
    assert found.to_dict() == config.to_dict() == recipes.from_workdir(tmp_path).to_dict()


@pytest.mark.parametrize("content", ["{", "[1]", "3", '{"seed": "x"}', '{"quant": 3}', None])
def test_workdirs_without_a_readable_configuration(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="no workdir with a readable config.json") as caught:
        recipes.load(tmp_path)
    assert "\n" not in str(caught.value)


# What the paper states --------------------------------------------------------------------------


# Lambda times the GBOPs of uniform 4/4; epochs of both stages of weight training.
@pytest.mark.parametrize(
    ("recipe", "candidates", "budget", "budget_weight", "epochs"),
    [
        ("mbv3", (8, 4, 3), 3.29, 4 * 3.786988544, (18, 120)),
        ("mbv2", (8, 4, 3), 5.28, 1 * 5.39405312, (18, 120)),
        ("resnet18", (8, 4, 2), 32.86, 0.4 * 34.7144192, (18, 70)),
    ],
)
def test_recipes_of_the_paper(recipe, candidates, budget, budget_weight, epochs):
    config = metamix_jax.load_config(recipe)
    assert config.quant.act_bits == candidates and config.quant.weight_bits == (4,)
    assert (config.budget.value, config.budget.unit) == (budget, "gbops")
    assert config.bit_search.budget_weight == pytest.approx(budget_weight, rel=1e-12)
    assert (config.weight_training.act_epochs, config.weight_training.epochs) == epochs
    assert (config.bit_meta.epochs, config.bit_search.epochs) == (1, 1)


# On the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "recipe", "rest"),
    [
        ([], None, []),
        (["--config=mbv2:budget=5"], "mbv2:budget=5", []),
        (
            ["--mode=cost", "-config=mbv2", "--config.seed=3"],
            "mbv2",
            ["--mode=cost", "--config.seed=3"],
        ),
        (["--config", "mbv2", "--workdir", "x"], "mbv2", ["--workdir", "x"]),
        (["--config"], "", []),
        (["--config="], "", []),
    ],
)
def test_where_the_recipe_stands(arguments, recipe, rest):
    assert command_line._split_config(["metamix", *arguments]) == (recipe, ["metamix", *rest])


def metamix(*arguments, folder):
    """Runs the command line in a folder outside the checkout."""
    return subprocess.run(
        [sys.executable, "-m", "metamix_jax", f"--workdir={folder}/run", *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_names_are_known_in_every_folder(tmp_path):
    done = metamix("--config", "digits", "--config.model.depth=14", "--mode=cost", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert found["model"] == "cifar_resnet14"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=digit"], "no such recipe, file or workdir; did you mean 'digits'?"),
        (["--config=digits", "--config.quant=8"], "config.quant"),
        (["--config.seed.x=8"], "config.seed.x: no such configuration key"),
        (["--wokdir=x"], "'wokdir'. Did you mean: workdir"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    done = metamix(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_help(tmp_path):
    done = metamix("--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("--config", "--workdir", "--mode", *command_line.MODES):
        assert word in done.stdout
