"""Recipes: the configurations of `configs/` by name, and helpers for writing them."""

import ast
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.config import default, section_of
from metamix_jax.errors import UserError, suggestion
from metamix_jax.workdir import bucket
from metamix_jax.workdir.files import read_json

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
_INSTALLED = Path(__file__).parent / "configs"  # in the package; in a checkout, next to it
FOLDER = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


def names() -> tuple[str, ...]:
    """Returns the names of the recipes included in the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("[!_]*.py")))


def load_config(recipe: str | Path, *, budget: float | None = None, **fields: Any) -> ConfigDict:
    """Returns the configuration of a recipe or a run, with overrides.

    Args:
      recipe: a name, such as "digits"; the path of a Python file with `get_config`; or a workdir.
        A name or file may be followed by an argument: "resnet18:weight_bits=3".
      budget: config.budget.value, in config.budget.unit.
      **fields: any other fields by path: seed=1, **{"bit_meta.epochs": 2}. A dictionary for a
        section overrides the fields it contains; for `model`, it replaces the section.

    Raises:
      UserError: unknown recipe or field, or a value of the wrong type.
    """
    config = load(recipe)
    if budget is not None:
        fields = {"budget.value": budget} | fields
    for path, value in fields.items():
        _set(config, path, value)
    return config


def load(recipe: str | Path) -> ConfigDict:
    """Returns the configuration for a value of --config; see `load_config`."""
    text = os.fspath(recipe)
    name, _, argument = text.partition(":")
    if name in names():
        return _from_file(FOLDER / f"{name}.py", argument)
    if text and (bucket.is_remote(text) or Path(text).expanduser().is_dir()):
        return from_workdir(bucket.path_of(text))
    file = Path(name).expanduser()
    if not file.is_file():
        hint = suggestion(file.stem, names())
        raise UserError(f"configuration {text!r}: no such recipe, file or workdir; {hint}")
    return _from_file(file, argument)


def run_of(place: str) -> Path | None:
    """Returns the workdir that holds a run: `place`, or that of the checkpoint there; or None."""
    path = bucket.path_of(place)
    for workdir in (path, path.parent, path.parent.parent):
        inside = path.relative_to(workdir).parts
        if inside[:1] in ((), (bucket.CHECKPOINTS,)) and (workdir / "config.json").exists():
            return workdir
    return None


def from_workdir(workdir: Path) -> ConfigDict:
    """Returns the configuration of the run in a workdir; raises UserError if there is none."""
    config = default()
    try:
        with config.unlocked():  # because the fields of `model` depend on the network
            config.update(_tuples(dict(read_json(workdir / "config.json"))))
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{workdir}: no workdir with a readable config.json ({error})") from error
    return config


def cifar10(**model: Any) -> ConfigDict:
    """Returns what the recipes on CIFAR-10 have in common, with the given fields of `model`."""
    config = default()
    config.model = ConfigDict(model)
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.mean, config.data.std = _MEAN, _STD
    config.data.augment = "crop_flip"
    config.batch_size = 128
    return config


def imagenet(network: str, budget_gbops: float) -> ConfigDict:
    """Returns what the recipes of the paper's ImageNet networks have in common."""
    config = default()
    config.model = ConfigDict({"name": network, "padding": "torch"})
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.image_size = 224
    config.data.eval_resize = 256
    config.data.num_classes = 1000
    config.data.mean, config.data.std = _MEAN, _STD
    config.data.augment = "random_resized_crop_flip"
    config.batch_size = 256
    config.log_every_steps = 100
    config.checkpoint_every_steps = 1000
    config.eval.batch_size = 1000
    config.eval.bn_reestimate_batches = 100

    config.budget.value = budget_gbops
    config.budget.unit = "gbops"
    config.loss = "distillation"
    config.teacher.model = ConfigDict({"name": "resnet101"})
    config.bit_meta.epochs = 1
    config.bit_search.epochs = 1
    config.weight_training.act_epochs = 18
    config.weight_training.epochs = 120
    return config


def parse_argument(argument: str, **fields: tuple[str, ...] | float) -> dict[str, Any]:
    """Returns the values in a configuration's argument, `key=value,...`.

    Args:
      argument: the text after the colon in --config=FILE:ARGUMENT.
      **fields: key -> allowed texts, the default first; or a default number.

    Raises:
      UserError: unknown key or value.
    """
    values = {key: kind[0] if isinstance(kind, tuple) else kind for key, kind in fields.items()}
    for part in filter(None, argument.split(",")):
        key, _, text = part.partition("=")
        if key not in fields:
            raise UserError(f"recipe argument {part!r}: {suggestion(key, fields)}")
        if isinstance(fields[key], tuple):
            if text not in fields[key]:
                hint = suggestion(text, fields[key])
                raise UserError(f"recipe argument {part!r}: expected {key}= {hint}")
            values[key] = text
        else:
            try:
                values[key] = float(text)
            except ValueError:
                raise UserError(f"recipe argument {part!r}: expected a number") from None
    return values


def parse_fields(texts: Iterable[str]) -> dict[str, Any]:
    """Returns the fields in FIELD=VALUE texts, for `load_config`: `seed=1`, `data.name=digits`.

    Raises:
      UserError: a text without "=".
    """
    parts = [text.partition("=") for text in texts]
    for key, equals, _ in parts:
        if not equals:
            raise UserError(f"{key!r}: expected FIELD=VALUE, such as seed=1")
    return {key: literal(value) for key, _, value in parts}


def literal(text: str) -> Any:
    """Returns the Python literal that a text is, a number or a tuple; otherwise the text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _from_file(path: Path, argument: str) -> ConfigDict:
    """Returns the result of a file's `get_config`; bugs in the file keep their traceback."""
    get_config = _get_config(path)
    arguments = [argument] if argument else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        expected = "no argument" if arguments else "an argument, after a colon"
        raise UserError(f"configuration {path.stem!r}: expected {expected}") from None
    try:
        config = get_config(*arguments)
    except (AttributeError, KeyError) as error:
        text = str(error)
        locked = re.search(r'Key "(\w+)" does not exist and cannot be added', text)
        if not locked:
            raise
        close = re.search(r'Did you mean "(\w+)"', text)
        hint = f"did you mean {close[1]!r}?" if close else "see docs/CONFIG.md"
        message = f"{path} sets {locked[1]}: no such configuration key; {hint}"
        raise UserError(message) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config returned {type(config).__name__}, expected the ConfigDict from "
            "metamix_jax.config.default(), with overrides"
        )
    return config.lock()


def _get_config(path: Path) -> Callable[..., Any]:
    if path.suffix != ".py":
        raise UserError(f"configuration {str(path)!r}: expected a recipe, a .py file or a workdir")
    spec = importlib.util.spec_from_file_location(f"metamix_jax_recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # needed by dataclasses defined in the file
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: expected a function get_config that returns a configuration")
    return module.get_config


def _set(config: ConfigDict, path: str, value: Any) -> None:
    section, key = section_of(config, path)
    old = section[key]
    if isinstance(old, ConfigDict) and isinstance(value, Mapping):
        if key != "model":
            for name, entry in value.items():
                _set(config, f"{path}.{name}", entry)
            return
        value = ConfigDict(value)
    try:
        section[key] = value
    except TypeError as error:
        kind = "a dictionary" if isinstance(old, ConfigDict) else f"a value such as {old!r}"
        raise UserError(f"config.{path}={value!r}: expected {kind}") from error


def _tuples(value: Any) -> Any:
    """Converts the lists of JSON to tuples, as in configurations."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
