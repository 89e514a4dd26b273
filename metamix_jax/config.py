"""The configuration: made from the rows of defaults.py, and checked before any work.

`python -m metamix_jax.config` prints docs/CONFIG.md.

A file in `configs/` starts from `default()` and overrides. The ConfigDict is locked: a key that is
no row cannot be set, so no key is ever silently unread (tests/test_config_reads.py holds that each
is read somewhere).
"""

from typing import Any

from ml_collections import ConfigDict

from metamix_jax import defaults
from metamix_jax.errors import UserError, require, suggestion
from metamix_jax.fields import document, is_finite

FIELDS = (*defaults.FIELDS, *defaults.SEARCHER_FIELDS)

INTRODUCTION = """\
# Configuration

Every field of a configuration. Set one in a file of `configs/`, on the command line
(`--config.budget.value=0.8`) or from Python
(`metamix_jax.load_config("digits", **{"budget.value": 0.8})`); an unknown field or a value that is
not allowed is an error of one line. A field whose last column says yes may change when a run is
resumed, because nothing that is computed depends on it.

This file is written by `make config-docs`; change `metamix_jax/defaults.py`, not this.

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
        hint = suggestion(key, section) if isinstance(section, ConfigDict) else "not a section"
        raise UserError(f"config.{path}: no such configuration key; {hint}")
    return section[key]


def validate(config: ConfigDict) -> None:
    """Raises UserError for values that cannot work; needs no data and no devices."""
    for field in FIELDS:
        if field.check is not None:
            section, key = section_of(config, field.path)
            require(field.check.holds(section[key]), field.path, section[key], field.check.expected)
    for rule in (*RULES, *SEARCHER_RULES):
        rule(config)


def validate_start(config: ConfigDict) -> None:
    """Raises UserError unless training has weights to start from and the teacher it learns from.

    Recipes leave both files to be named on the command line; cost and evaluation need neither.
    """
    if config.search.searcher != "none" and not config.pretrained:
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


def _size_follows_weight_bits(config: ConfigDict) -> None:
    _require(
        config, "quant.weight_bits",
        len(config.quant.weight_bits) > 1 or config.budget.unit != "mebibytes",
        "two or more with budget.unit='mebibytes'",
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
            f"1 or {channels} numbers, one per channel",
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
    _size_follows_weight_bits,
    _budgets_differ,
    _a_number_per_channel,
    _resized_to_no_less_than_the_crop,
)


# What a searcher needs --------------------------------------------------------------------------


def _search_has_epochs(config: ConfigDict) -> None:
    searcher = config.search.searcher
    _require(
        config, "bit_search.epochs",
        config.bit_search.epochs > 0 or searcher not in ("metamix", "joint", "asga"),
        f"more than 0 for searcher {searcher}",
    )  # fmt: skip


def _weights_are_trained(config: ConfigDict) -> None:
    if config.search.searcher == "none":
        section, expected = "full_precision", "more than 0 for searcher none"
    else:
        section, expected = "weight_training", "more than 0, or nothing would quantize the weights"
    _require(config, f"{section}.epochs", config[section].epochs > 0, expected)


def _further_budgets_need_a_fixed_meta_state(config: ConfigDict) -> None:
    options = config.bit_search
    fixed = options.fixed_meta_state and not options.commit_batch_stats
    _require(
        config, "search.budgets",
        not config.search.budgets or (config.search.searcher == "metamix" and fixed),
        "none, but with searcher metamix and a fixed meta-state",
    )  # fmt: skip


def _ompq_chooses_one_kind(config: ConfigDict) -> None:
    fewest = min(len(config.quant.act_bits), len(config.quant.weight_bits))
    _require(
        config, "quant.weight_bits", fewest == 1 or config.search.searcher != "ompq",
        "one, or one of quant.act_bits, for searcher ompq",
    )  # fmt: skip


def _uniform_width_is_a_candidate(config: ConfigDict) -> None:
    if config.search.searcher == "uniform":
        for name in ("act_bits", "weight_bits"):
            widths = tuple(config.quant[name])
            _require(
                config, "search.uniform_bits",
                len(widths) == 1 or config.search.uniform_bits in widths,
                f"one of quant.{name} {widths}",
            )  # fmt: skip


def _policy_goes_with_file(config: ConfigDict) -> None:
    searcher = config.search.searcher
    wanted = "a policy.json" if searcher == "file" else "nothing"
    _require(
        config, "search.policy", bool(config.search.policy) == (searcher == "file"),
        f"{wanted} with searcher {searcher}",
    )  # fmt: skip


SEARCHER_RULES = (
    _search_has_epochs,
    _weights_are_trained,
    _further_budgets_need_a_fixed_meta_state,
    _ompq_chooses_one_kind,
    _uniform_width_is_a_candidate,
    _policy_goes_with_file,
)


def documentation() -> str:
    """Returns the text of docs/CONFIG.md."""
    return INTRODUCTION + document(FIELDS, defaults.SECTIONS) + "\n"


if __name__ == "__main__":
    print(documentation(), end="")
