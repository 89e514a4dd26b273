"""What a network offers to the rest of the program; each file of zoo/ defines some."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from metamix_jax.errors import UserError
from metamix_jax.networks.drawing import Drawing

Rules = tuple[tuple[str, str], ...]  # regular expressions and replacements, applied in this order
Fields = Mapping[str, Any]  # of config.model, without the name


class TorchNames(NamedTuple):
    """How the modules of a network are called in PyTorch.

    modules: from our module path, joined by dots, to torchvision's.
    aliases: from what other files call a module to torchvision's name.
    """

    modules: Rules = ()
    aliases: Rules = ()


def check_padding(fields: Fields, source: str) -> None:
    """Raises UserError unless `padding`, where it is given, is one that layers know."""
    if fields.get("padding", "torch") not in ("torch", "tf"):
        raise UserError(f"{source}.padding={fields['padding']!r}: expected torch or tf")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network by the name that config.model.name gives it.

    name: that name.
    module: its Flax class, whose own fields are those of config.model.
    check: raises UserError for values of (fields, source) that it cannot take, `source` being what
      the section is called.
    label: from the fields to what people call it; by default the name.
    torch_names: of weight files.
    draw: of (model, drawing), adds all nodes, the class scores last; None: it cannot be exported.
    shortcut: last part of the path of the convolutions beside a block's last layer.
    ompq_rounds_below: whether searcher ompq rounds widths for a size to the closest size below, as
      its published code does for ResNet-18; else each to the nearest.
    """

    name: str
    module: type[nn.Module]
    check: Callable[[Fields, str], None] = check_padding
    label: Callable[[Fields], str] | None = None
    torch_names: TorchNames = TorchNames()
    draw: Callable[[Any, Drawing], None] | None = None
    shortcut: str | None = None
    ompq_rounds_below: bool = False
