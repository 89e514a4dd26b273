"""Networks by name; every file in zoo/ registers its own, as `ARCHITECTURES`."""

import dataclasses
import importlib
import pkgutil
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.errors import UserError, suggestion
from metamix_jax.networks import own, zoo
from metamix_jax.networks.architecture import Architecture
from metamix_jax.networks.intercepted import InterceptedNetwork
from metamix_jax.networks.precision import QuantSettings


def _find() -> dict[str, Architecture]:
    modules = [
        importlib.import_module(f"{zoo.__name__}.{module.name}")
        for module in pkgutil.iter_modules(zoo.__path__)
    ]
    return {found.name: found for module in modules for found in module.ARCHITECTURES}


ARCHITECTURES = _find()
_SHARED = {"num_classes", "parent", "name"}  # fields that config.model does not set


def make(
    config_model: ConfigDict,
    num_classes: int,
    settings: QuantSettings,
    image_shape: tuple[int, int, int],
    source: str = "config.model",
    model: Any = None,
) -> InterceptedNetwork:
    """Returns the network described by `config_model`, the section called `source`.

    Args:
      config_model: its name and fields.
      num_classes: number of classes.
      settings: of the quantizers.
      image_shape: (height, width, channels).
      source: for error messages.
      model: the network itself, where a Python program hands it over.

    Raises:
      UserError: unknown network, unknown field or invalid value.
    """
    fields = dict(config_model)
    name = fields.pop("name")
    if own.is_own(name):
        return own.make(name, fields, num_classes, settings, image_shape, source, model)
    if name not in ARCHITECTURES:
        hint = suggestion(name, ARCHITECTURES)
        raise UserError(
            f"{source}.name={name!r}: unknown network; {hint}; or FILE.py:NAME for your own"
        )
    architecture = ARCHITECTURES[name]
    known = {field.name for field in dataclasses.fields(architecture.module)} - _SHARED
    for key in set(fields) - known:
        hint = suggestion(key, known) if known else "it has no fields"
        raise UserError(f"{source}.{key}: {name} has no such field; {hint}")
    architecture.check(fields, source)
    module = architecture.module(num_classes=num_classes, **fields)
    return own.make(name, {}, num_classes, settings, image_shape, source, module)


def label(config_model: ConfigDict) -> str:
    """Returns the network's display name, such as `cifar_resnet20`."""
    if own.is_own(config_model.name):
        return own.label(config_model.name)
    architecture = ARCHITECTURES[config_model.name]
    return architecture.label(config_model) if architecture.label else architecture.name


def architecture_of(model: InterceptedNetwork) -> Architecture:
    """Returns the architecture of a network created by `make`."""
    kind = type(getattr(model.network, "module", None))
    own_network = Architecture(model.network.label, InterceptedNetwork)
    return next((found for found in ARCHITECTURES.values() if found.module is kind), own_network)


def default_fields(name: str) -> dict[str, Any]:
    """Returns the fields of config.model for a network, with their defaults; None: no default.

    Raises:
      UserError: there is no such network.
    """
    if own.is_own(name):
        return own.fields(name)
    if name not in ARCHITECTURES:
        return {}
    return {
        field.name: field.default
        for field in dataclasses.fields(ARCHITECTURES[name].module)
        if field.name not in _SHARED
    }
