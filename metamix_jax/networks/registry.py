"""Networks by name."""

import dataclasses

from flax import linen as nn
from ml_collections import ConfigDict

from metamix_jax.errors import UserError, suggestion
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.networks.zoo.mobilenet import MobileNetV2, MobileNetV3Large
from metamix_jax.networks.zoo.resnet import CifarResNet, ResNet18, ResNet50, ResNet101

MODELS = {
    "cifar_resnet": CifarResNet,
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_large": MobileNetV3Large,
}
_SHARED = {"num_classes", "settings", "parent", "name"}  # not from config.model


def make(
    config_model: ConfigDict,
    num_classes: int,
    settings: QuantSettings,
    source: str = "config.model",
) -> nn.Module:
    """Returns the network that `config_model`, the field called `source`, names.

    Raises:
      UserError: unknown network, unknown field of it, or a value it cannot take.
    """
    fields = dict(config_model)
    name = fields.pop("name")
    if name not in MODELS:
        raise UserError(f"{source}.name={name!r}: unknown network; {suggestion(name, MODELS)}")
    known = {field.name for field in dataclasses.fields(MODELS[name])} - _SHARED
    for key in set(fields) - known:
        hint = suggestion(key, known) if known else "it takes none"
        raise UserError(f"{source}.{key}: {name} has no such field; {hint}")
    if fields.get("padding", "torch") not in ("torch", "tf"):
        raise UserError(f"{source}.padding={fields['padding']!r}: expected torch or tf")
    if name == "cifar_resnet":
        _check_cifar_resnet(fields, source)
    return MODELS[name](num_classes=num_classes, settings=settings, **fields)


def label(config_model: ConfigDict) -> str:
    """Returns the network's name as people say it, e.g. `cifar_resnet20`."""
    return f"{config_model.name}{config_model.get('depth', '')}"


def _check_cifar_resnet(fields: dict, source: str) -> None:
    depth = fields.get("depth", 20)
    if not 8 <= depth <= 1202 or (depth - 2) % 6:
        raise UserError(f"{source}.depth={depth}: expected 6 n + 2, such as 8, 20, 32, 56")
    if not 1 <= fields.get("width", 16) <= 4096:
        raise UserError(f"{source}.width={fields['width']}: expected at least 1, at most 4096")
    if fields.get("shortcut", "identity") not in ("identity", "conv"):
        raise UserError(f"{source}.shortcut={fields['shortcut']!r}: expected identity or conv")
