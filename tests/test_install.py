"""What `pip install` installs: dependencies, the wheel's files, the command, the functions."""

import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import metamix_jax
from metamix_jax.workdir import digests
from tests.helpers.config_fields import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {
    name: {str(Requirement(line)) for line in lines}
    for name, lines in PROJECT["project"]["optional-dependencies"].items()
}


def requirements(name):
    """Returns the requirements in a file, without those of the file it includes."""
    lines = [line.split("  #")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    assert (lines[0] == "-r requirements.txt") == (name != "requirements.txt")
    return {str(Requirement(line)) for line in lines if line and line[0] not in "#-"}


def pins():
    """Returns canonical name -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in found}


def test_requirements_files_agree_with_the_project():
    assert PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": "requirements.txt"}
    assert EXTRAS.keys() == {"gpu", "tpu", "export", "litert", "gcs", "torch"}
    assert EXTRAS["gpu"] == requirements("requirements-gpu.txt")
    assert EXTRAS["tpu"] == requirements("requirements-tpu.txt")
    assert EXTRAS["gcs"] <= requirements("requirements-dev.txt") & EXTRAS["tpu"]


def test_versions_that_are_tested_are_allowed():
    versions = pins()
    asked = requirements("requirements.txt") | requirements("requirements-dev.txt")
    asked |= {*PROJECT["build-system"]["requires"]}.union(*EXTRAS.values())
    for requirement in map(Requirement, asked - EXTRAS["torch"]):
        version = versions[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, requirement
    (torch,) = map(Requirement, EXTRAS["torch"])
    assert re.search(r"torch==(\S+)", (ROOT / "Makefile").read_text())[1] in torch.specifier


def test_every_folder_is_a_package_of_the_project():
    settings = PROJECT["tool"]["setuptools"]
    folders = [path.parent for path in (ROOT / "metamix_jax").rglob("__init__.py")]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert {*settings["packages"]} == names | {"metamix_jax.configs"}
    assert settings["package-dir"] == {"metamix_jax.configs": "configs"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the content of the wheel built from this checkout."""
    pytest.importorskip("setuptools", minversion="77", reason="see requirements-dev.txt")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for folder in ("metamix_jax", "configs", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "main.py"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def run_installed(folder, *arguments):
    """Runs Python with only the content of the wheel, in a folder without our files."""
    elsewhere = folder.with_name(f"{folder.name}_elsewhere")
    elsewhere.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_its_recipes(installed):
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "metamix_jax").rglob("*.py")}
    recipes = {f"metamix_jax/configs/{path.name}" for path in ROOT.glob("configs/*.py")}
    facts = f"metamix_jax-{metamix_jax.__version__}.dist-info/"
    assert {name for name in found if not name.startswith(facts)} == modules | recipes


def test_the_wheel_asks_for_what_the_requirements_say(installed):
    (folder,) = installed.glob("*.dist-info")
    wheel = importlib.metadata.Distribution.at(folder)
    assert wheel.version == metamix_jax.__version__
    asked = [Requirement(text) for text in wheel.requires]
    base = {str(requirement) for requirement in asked if requirement.marker is None}
    assert base == requirements("requirements.txt")
    (command,) = wheel.entry_points
    assert (command.group, command.name) == ("console_scripts", "metamix")
    assert command.value == "metamix_jax.command_line:run"


def test_the_wheel_runs_recipes_by_name(installed):
    code = (
        "import json, metamix_jax; from metamix_jax.workdir import digests\n"
        "config = metamix_jax.load_config('digits', budget=0.8)\n"
        "print(json.dumps([metamix_jax.__file__, config.budget.value, digests.of_code()]))"
    )
    file, budget, code_digests = json.loads(run_installed(installed, "-c", code))
    assert Path(file).is_relative_to(installed) and budget == 0.8
    # A run started in a checkout can be resumed by the installed package.
    assert code_digests == digests.of_code()
    workdir = f"--workdir={installed}_run"
    arguments = ("--config=mbv2:budget=5", workdir, "--mode=cost")
    said = run_installed(installed, "-m", "metamix_jax", *arguments)
    assert json.loads(said.splitlines()[-1].removeprefix("RESULT "))["model"] == "mobilenet_v2"


# From Python ----------------------------------------------------------------------------------


def test_the_package_names_what_it_has():
    names = {"evaluate", "export", "load_config", "load_integer", "load_policy", "quantize",
             "search", "train"}  # fmt: skip
    assert {*dir(metamix_jax)} == names | {"__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", metamix_jax.__version__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        metamix_jax.nothing  # noqa: B018


GIVEN = ("model", "variables", "data")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("load_config", ["recipe", "budget", "fields"]),
        ("load_policy", ["path"]),
        ("train", ["config", "workdir", *GIVEN]),
        ("search", ["config", "workdir", *GIVEN]),
        ("quantize", ["config", "policy", *GIVEN]),
        ("evaluate", ["source", "model", "data"]),
        ("export", ["source", "directory", "model", "data"]),
    ],
)
def test_functions_have_signatures_and_docstrings(name, parameters):
    function = getattr(metamix_jax, name)
    signature = inspect.signature(function)
    assert list(signature.parameters) == parameters
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert signature.return_annotation is not signature.empty
    assert inspect.getdoc(function)
