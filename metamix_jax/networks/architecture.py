"""The interface of a network; each file in zoo/ defines one or more."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from metamix_jax.errors import UserError

Rules = tuple[tuple[str, str], ...]  # regular expressions and replacements, applied in this order
Fields = Mapping[str, Any]  # of config.model, without the name


class TorchNames(NamedTuple):
    """The names of a network's modules in PyTorch.

    modules: from our module path, joined by dots, to torchvision's name.
    aliases: from the names in other weight files to torchvision's.
    """

    modules: Rules = ()
    aliases: Rules = ()


def check_padding(fields: Fields, source: str) -> None:
    """Raises UserError if `padding` is given but not supported by the layers."""
    if fields.get("padding", "torch") not in ("torch", "tf"):
        raise UserError(f"{source}.padding={fields['padding']!r}: expected torch or tf")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A registered network.

    name: its name in config.model.name.
    module: its Flax class, plain Linen; its own fields are those of config.model.
    check: given (fields, source), raises UserError for invalid values; `source` is the name of the
      section.
    label: returns the display name, given the fields; None: the name.
    torch_names: names in PyTorch weight files.
    shortcut: last component of the path of shortcut convolutions.
    ompq_rounds_below: whether searcher ompq, given a size, rounds widths to the closest total size
      below, as its published code does for ResNet-18; otherwise each width to the nearest.
    """

    name: str
    module: type[nn.Module]
    check: Callable[[Fields, str], None] = check_padding
    label: Callable[[Fields], str] | None = None
    torch_names: TorchNames = TorchNames()
    shortcut: str | None = None
    ompq_rounds_below: bool = False
