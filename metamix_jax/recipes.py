"""Recipes: the files of `configs/` by name, and what they are made with."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.config import default
from metamix_jax.errors import UserError, suggestion

# Installed, they lie inside the package; in a checkout, beside it.
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")


def names() -> tuple[str, ...]:
    """Returns the recipes that come with the package, by the names that --config takes."""
    found = {path.stem for folder in _FOLDERS for path in folder.glob("*.py")}
    return tuple(sorted(name for name in found if not name.startswith("_")))


def locate(recipe: str) -> Path:
    """Returns the file of a recipe: one of `names()`, or the path of a file.

    Raises:
      UserError: neither.
    """
    if recipe in names():
        return next(path for folder in _FOLDERS if (path := folder / f"{recipe}.py").is_file())
    if not Path(recipe).is_file():
        raise UserError(f"--config={recipe}: no such file or recipe; {suggestion(recipe, names())}")
    return Path(recipe)


def load_config(recipe: str | Path, *, budget: float | None = None, **fields: Any) -> ConfigDict:
    """Returns the configuration of a recipe, or of a run.

    Args:
      recipe: a name, such as "digits"; the path of a file with `get_config`; or a workdir. A name
        or a file may be followed by its argument: "resnet18:weight_bits=3".
      budget: config.budget.value, in config.budget.unit.
      **fields: any others, by their names or dotted paths: seed=1, **{"bit_meta.epochs": 2}.

    Raises:
      UserError: no such recipe or field, or a value of another type.
    """
    name, _, argument = str(recipe).partition(":")
    if Path(recipe).is_dir():
        config = read_config(Path(recipe))
    else:
        path = locate(name)
        spec = importlib.util.spec_from_file_location(f"metamix_recipe_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path}: expected a function get_config, which returns the recipe")
        config = module.get_config(*([argument] if argument else []))
    if budget is not None:
        fields = {"budget.value": float(budget)} | fields
    for key, value in fields.items():
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, AttributeError, TypeError) as error:
            known = config.to_dict()
            *sections, last = key.split(".")
            for section in sections:
                known = known.get(section, {}) if isinstance(known, dict) else {}
            if not isinstance(known, dict) or last not in known:
                hint = suggestion(last, known) if known else "no such section"
                raise UserError(f"{key}={value!r}: no such field; {hint}") from error
            kind = type(known[last]).__name__
            raise UserError(f"{key}={value!r}: expected a value of type {kind}") from error
    return config


def read_config(workdir: Path) -> ConfigDict:
    """Returns the configuration of a workdir; raises UserError."""
    try:
        fields = json.loads((workdir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir}: no workdir with a readable config.json ({error})") from error
    config = default()
    with config.unlocked():  # the fields of `model` are the network's
        config.update(_tuples(fields))
    return config


def imagenet(network: str, budget_gbops: float) -> ConfigDict:
    """Returns the recipe of the paper's networks; what differs between them is set by each."""
    config = default()
    config.model = ConfigDict({"name": network, "padding": "torch"})
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.image_size = 224
    config.data.eval_resize = 256
    config.data.num_classes = 1000
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
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
    """Returns the values set in a configuration's argument, `key=value,...`.

    Args:
      argument: what follows the colon in --config=FILE:ARGUMENT.
      **fields: key -> allowed texts, the default first; or the default of a number.

    Raises:
      UserError: unknown key or value.
    """
    values = {key: kind[0] if isinstance(kind, tuple) else kind for key, kind in fields.items()}
    for part in filter(None, argument.split(",")):
        key, _, text = part.partition("=")
        if key not in fields:
            raise UserError(f"--config argument {part!r}: {suggestion(key, fields)}")
        if isinstance(fields[key], tuple):
            if text not in fields[key]:
                hint = suggestion(text, fields[key])
                raise UserError(f"--config argument {part!r}: expected {key}= {hint}")
            values[key] = text
        else:
            try:
                values[key] = float(text)
            except ValueError:
                raise UserError(f"--config argument {part!r}: expected a number") from None
    return values


def _tuples(value: Any) -> Any:
    """Returns JSON's lists as the tuples that a configuration has."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
