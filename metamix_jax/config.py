"""The configuration: made from the rows of defaults.py, and checked before any work.

`python -m metamix_jax.config` prints docs/CONFIG.md.

A file in `configs/` starts from `default()` and overrides. The ConfigDict is locked: a key that is
no row cannot be set, so no key is ever silently unread (tests/test_config_reads.py holds that each
is read somewhere).
"""

from typing import Any

from ml_collections import ConfigDict

from metamix_jax.defaults import FIELDS, SECTIONS
from metamix_jax.errors import UserError, require, suggestion
from metamix_jax.fields import document, is_finite
from metamix_jax.selection.cost_models import BUDGET_UNITS

INTRODUCTION = """\
# Configuration

Every field of a configuration. Set one in a file of `configs/`, on the command line
(`--config.budget.value=0.8`) or from Python
(`metamix_jax.load_config("digits", **{"budget.value": 0.8})`); an unknown field or a value that is
not allowed is an error of one line. A field whose last column says yes may change when a run is
resumed, because nothing that is computed depends on it.

This file is written by `make config-docs`, from `metamix_jax/defaults.py` and the searchers' files.

"""


def default() -> ConfigDict:
    """Returns all fields with their defaults; `model`, `data` and the start are left to fill in."""
    config = ConfigDict()
    for field in FIELDS:
        *sections, key = field.path.split(".")
        section = config
        for name in sections:
            if name not in section:
                section[name] = ConfigDict()
            section = section[name]
        section[key] = field.default
    return config.lock()


def may_change() -> frozenset[str]:
    """Returns the paths of the fields that a resumed run may change."""
    return frozenset(field.path for field in FIELDS if field.may_change)


def section_of(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
    """Returns the section that holds the field at `path`, and the field's key in it.

    Raises:
      UserError: there is no such field.
    """
    *sections, last = path.split(".")
    section = config
    for key in sections:
        section = _child(section, key, path)
    _child(section, last, path)
    return section, last


def _child(section: Any, key: str, path: str) -> Any:
    """Returns what a section holds by a key of `path`."""
    if not isinstance(section, ConfigDict) or key not in section:
        hint = _hint(key, section) if isinstance(section, ConfigDict) else "not a section"
        raise UserError(f"config.{path}: no such configuration key; {hint}")
    return section[key]


def _hint(key: str, section: ConfigDict) -> str:
    elsewhere = [f.path for f in FIELDS if f.path.endswith(f".{key}")]
    if elsewhere:
        return f"did you mean {' or '.join(f'config.{path}' for path in elsewhere)}?"
    return suggestion(key, section)


def parsed_value(config: ConfigDict, path: str, text: str) -> None:
    """Raises UserError where a text of the command line cannot be the value of a field.

    Only of numbers: what the other types take is checked by `validate`.
    """
    section, key = section_of(config, path)
    old = section[key]
    if isinstance(old, ConfigDict):
        raise UserError(
            f"config.{path} is a section; set its fields, such as "
            f"--config.{path}.{next(iter(old), 'name')}=..."
        )
    if isinstance(old, bool) or not isinstance(old, int | float):
        return
    kind = "a whole number" if isinstance(old, int) else "a number"
    try:
        type(old)(text)
    except ValueError:
        raise UserError(f"config.{path}={text!r}: expected {kind}, such as {old!r}") from None


def validate(config: ConfigDict) -> None:
    """Raises UserError for values that cannot work; needs no data and no devices.

    What goes with which searcher is checked by selection/checks.py.
    """
    for field in FIELDS:
        if field.check is not None:
            section, key = section_of(config, field.path)
            require(field.check.holds(section[key]), field.path, section[key], field.check.expected)
    for rule in RULES:
        rule(config)


def validate_start(config: ConfigDict) -> None:
    """Raises UserError unless training has weights to start from and the teacher it learns from.

    Recipes leave both files to be named on the command line; cost and evaluation need neither.
    """
    if not config.pretrained:
        _require(
            config, "full_precision.epochs", config.full_precision.epochs > 0,
            "more than 0, or config.pretrained naming trained weights to start from",
        )  # fmt: skip
    needs_teacher = config.loss != "cross_entropy"
    _require(
        config, "teacher.path", bool(config.teacher.path) == needs_teacher,
        f"{'a weight file or a workdir' if needs_teacher else 'nothing'} with loss={config.loss!r}",
    )  # fmt: skip


def _require(config: ConfigDict, path: str, holds: bool, expected: str) -> None:
    section, key = section_of(config, path)
    require(holds, path, section[key], expected)


# What fields may hold together ------------------------------------------------------------------


def _several_candidates(config: ConfigDict) -> None:
    candidates = len(config.quant.act_bits) * len(config.quant.weight_bits)
    _require(
        config, "quant.act_bits", candidates > 1,
        "two or more, or several quant.weight_bits, to choose from",
    )  # fmt: skip


def _choices_change_the_cost(config: ConfigDict) -> None:
    unit = config.budget.unit
    _require(
        config, "quant.weight_bits",
        len(config.quant.weight_bits) > 1 or not BUDGET_UNITS[unit].needs_weight_bits,
        f"two or more with budget.unit={unit!r}",
    )  # fmt: skip


def _budgets_differ(config: ConfigDict) -> None:
    values = tuple(config.search.budgets)
    positive = all(is_finite(value) and 0 < value != config.budget.value for value in values)
    _require(
        config, "search.budgets",
        positive and len({f"{value:g}" for value in values}) == len(values),
        "different numbers above 0, other than budget.value",
    )  # fmt: skip


def _a_number_per_channel(config: ConfigDict) -> None:
    channels = config.data.channels
    for name in ("mean", "std"):
        values = config.data[name]
        _require(
            config, f"data.{name}",
            len(values) in (1, channels) and all(map(is_finite, values)),
            "1 number" if channels == 1 else f"1 number, or {channels}, one per channel",
        )  # fmt: skip
    _require(config, "data.std", min(config.data.std) > 0, "values above 0")


def _resized_to_no_less_than_the_crop(config: ConfigDict) -> None:
    size = config.data.image_size
    _require(
        config, "data.eval_resize",
        config.data.eval_resize == 0 or config.data.eval_resize >= size,
        f"0, or at least data.image_size={size}",
    )  # fmt: skip


RULES = (
    _several_candidates,
    _choices_change_the_cost,
    _budgets_differ,
    _a_number_per_channel,
    _resized_to_no_less_than_the_crop,
)


def documentation() -> str:
    """Returns the text of docs/CONFIG.md."""
    return INTRODUCTION + document(FIELDS, SECTIONS) + "\n"


if __name__ == "__main__":
    print(documentation(), end="")
