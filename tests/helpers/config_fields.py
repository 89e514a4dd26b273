"""The configurations in configs/, and access to their fields by dotted path."""

import importlib.util
import pathlib
import re

from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).parents[2]


def load(path, argument=""):
    """Returns a file's configuration with the overrides of the command in its docstring."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument) if argument else module.get_config()
    command = module.__doc__.split("\n\n")[1]
    overrides = re.findall(r"--config\.([\w.]+)=(\S+)", command)
    config.update_from_flattened_dict(dict(overrides))
    return config


def change(config, path, value):
    *sections, key = path.split(".")
    for section in sections:
        config = config[section]
    with config.ignore_type():
        config[key] = value


def leaves(tree, prefix=""):
    """Returns the dotted paths of all fields."""
    paths = []
    for key, value in tree.items():
        if isinstance(value, ConfigDict):
            paths += leaves(value, f"{prefix}{key}.")
        else:
            paths.append(prefix + key)
    return paths


def value_of(config, path):
    for key in path.split("."):
        config = config[key]
    return config
