"""Rules for layers: config.quant.rules, such as ("fc=searched", "blocks.*/mlp=4/8").

A rule is PATTERN=SETTING; the pattern is a regular expression for the whole path of a layer. Later
rules go before earlier ones.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from metamix_jax.errors import UserError, suggestion
from metamix_jax.networks.precision import Bits
from metamix_jax.networks.tracing import Layer

EXPECTED = (
    "rules PATTERN=SETTING: the whole path of a layer as a regular expression, and ACT/WEIGHT bits "
    "from 2 to 8, searched, signed, unsigned or 'shift NUMBER'"
)
_SETTING = re.compile(
    r"(?P<act>[2-8])/(?P<weight>[2-8])|(?P<word>searched|signed|unsigned)"
    r"|shift (?P<shift>\d+\.?\d*|\.\d+)"
)


def is_rule(text: object) -> bool:
    """Returns whether a text is a rule."""
    if not isinstance(text, str):
        return False
    pattern, _, setting = text.rpartition("=")
    try:
        re.compile(pattern)
    except re.error:
        return False
    return bool(pattern and _SETTING.fullmatch(setting))


def ruled(layers: Mapping[str, Layer], rules: Sequence[str]) -> dict[str, Layer]:
    """Returns layers as the rules want them; raises UserError for a rule that fits no layer."""
    found = dict(layers)
    for rule in rules:
        pattern, _, setting = rule.rpartition("=")
        names = [name for name in layers if re.fullmatch(pattern, name)]
        if not names:
            raise UserError(
                f"config.quant.rules: {rule!r} fits no layer; {suggestion(pattern, layers)}"
            )
        found |= {name: _changed(found[name], setting) for name in names}
    return found


def _changed(layer: Layer, setting: str) -> Layer:
    match = _SETTING.fullmatch(setting)
    if match["act"]:
        bits = Bits(int(match["act"]), int(match["weight"]))
        return dataclasses.replace(layer, bits=bits)
    if match["word"] == "searched":
        return dataclasses.replace(layer, first=False, last=False, bits=None)
    shift = float(match["shift"] or 0)
    return dataclasses.replace(layer, signed=(match["word"] == "signed",) * 2, shift=(shift, shift))
