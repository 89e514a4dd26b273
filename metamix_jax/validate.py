"""Checks of a configuration before any work; they need no data and no devices.

What goes with which searcher is in selection/checks.py.
"""

import sys

from ml_collections import ConfigDict

from metamix_jax.errors import UserError

CHOICES = {
    "loss": ("cross_entropy", "distillation", "both"),
    "compute_dtype": ("float32", "bfloat16"),
    "data.augment": ("none", "crop_flip", "crop", "random_resized_crop_flip"),
    "quant.init_pass": ("full_precision", "lowest_bits"),
    "quant.init_rule": ("shifted", "unshifted", "mse"),
    "quant.positive_step": ("floor", "abs", "softplus"),
    "optimizer.name": ("adam", "sgd"),
    "bit_meta.loss": ("mean", "last"),
    "bit_search.budget_form": ("argmax", "expected"),
}  # fmt: skip

_RANGES = {
    "more than 0": (
        lambda value: value > 0,
        (
            "batch_size", "accumulation_steps", "log_every_steps", "checkpoint_every_steps",
            "data.image_size", "data.channels", "data.num_classes", "eval.batch_size",
            "budget.value", "optimizer.eps", "optimizer.clip_norm", "diagnose.batches",
        ),
    ),
    "0 or more": (
        lambda value: value >= 0,
        (
            "eval.every_steps", "eval.bn_reestimate_batches", "optimizer.weight_decay",
            "full_precision.epochs", "full_precision.learning_rate", "bit_meta.epochs",
            "bit_meta.learning_rate", "bit_search.epochs", "bit_search.learning_rate",
            "bit_search.budget_weight", "bit_search.weight_decay", "weight_training.act_epochs",
            "weight_training.epochs", "weight_training.learning_rate", "data.in_memory_gib",
            "data.eval_resize", "data.max_bad_examples", "asga.start_radius", "asga.max_radius",
            "asga.alignment", "ompq.beta", "export.examples", "max_skipped_steps", "cpu_devices",
        ),
    ),
    "0 or more and less than 1": (
        lambda value: 0 <= value < 1,
        ("optimizer.b1", "optimizer.b2", "bit_search.b1", "bit_search.b2"),
    ),
    "0 to 1": (lambda value: 0 <= value <= 1, ("search.least_spent",)),
    # What makes the arrays of a run large.
    "at most 4096": (
        lambda value: value <= 4096,
        ("data.image_size", "data.channels", "data.eval_resize"),
    ),
    "at most 1048576": (
        lambda value: value <= 2**20,
        ("batch_size", "eval.batch_size", "data.num_classes"),
    ),
    "at most 1024": (lambda value: value <= 1024, ("cpu_devices",)),
    "0 to 4294967295": (lambda value: 0 <= value < 2**32, ("seed",)),
    "2 to 8": (lambda value: 2 <= value <= 8, ("quant.first_last_bits",)),
}  # fmt: skip


def validate(config: ConfigDict) -> None:
    """Raises UserError for values that cannot work; needs no data and no devices."""
    for path, allowed in CHOICES.items():
        value = _get(config, path)
        _require(value in allowed, path, value, f"one of {', '.join(allowed)}")
    for expected, (holds, paths) in _RANGES.items():
        for path in paths:
            value = _get(config, path)
            _require(_is_finite(value) and holds(value), path, value, expected)
    act_bits, weight_bits = tuple(config.quant.act_bits), tuple(config.quant.weight_bits)
    for path, bits in (("quant.act_bits", act_bits), ("quant.weight_bits", weight_bits)):
        _require(
            0 < len(bits) == len(set(bits))
            and all(isinstance(b, int) and 2 <= b <= 8 for b in bits),
            path, bits, "one or more different bit-widths from 2 to 8, such as (8, 4, 2)",
        )  # fmt: skip
    _require(
        len(act_bits) * len(weight_bits) > 1,
        "quant.act_bits", act_bits, "two or more, or several quant.weight_bits, to choose from",
    )  # fmt: skip
    value = config.quant.image_bits
    _require(value == 32 or 2 <= value <= 8, "quant.image_bits", value, "2 to 8, or 32")
    seeds = tuple(config.compare.seeds)
    _require(
        all(isinstance(v, int) and 0 <= v < 2**32 for v in seeds),
        "compare.seeds", seeds, "whole numbers from 0 to 4294967295",
    )  # fmt: skip
    value = tuple(config.search.budgets)
    _require(
        all(_is_finite(v) and 0 < v != config.budget.value for v in value)
        and len({f"{v:g}" for v in value}) == len(value),
        "search.budgets", value, "different numbers above 0, other than budget.value",
    )  # fmt: skip
    for path in ("mean", "std"):
        value = tuple(config.data[path])
        _require(
            len(value) in (1, config.data.channels) and all(map(_is_finite, value)),
            f"data.{path}", value, f"1 or {config.data.channels} numbers, one per channel",
        )  # fmt: skip
    _require(min(config.data.std) > 0, "data.std", tuple(config.data.std), "values above 0")
    value = config.data.eval_resize
    _require(
        value == 0 or value >= config.data.image_size,
        "data.eval_resize", value, f"0, or at least data.image_size={config.data.image_size}",
    )  # fmt: skip


def validate_start(config: ConfigDict) -> None:
    """Raises UserError unless training has weights to start from and the teacher it learns from.

    Recipes leave both files to be named on the command line; cost and evaluation need neither.
    """
    if not config.pretrained:
        _require(
            config.full_precision.epochs > 0, "full_precision.epochs", config.full_precision.epochs,
            "more than 0, or config.pretrained naming trained weights to start from",
        )  # fmt: skip
    needs_teacher = config.loss != "cross_entropy"
    _require(
        bool(config.teacher.path) == needs_teacher, "teacher.path", config.teacher.path,
        f"{'a weight file or a workdir' if needs_teacher else 'nothing'} with loss={config.loss!r}",
    )  # fmt: skip


def _is_finite(value) -> bool:
    # Nor a whole number of 400 digits, which is none as a float.
    return isinstance(value, float | int) and abs(value) <= sys.float_info.max


def _get(config: ConfigDict, path: str):
    for key in path.split("."):
        config = config[key]
    return config


def _require(condition: bool, path: str, value, expected: str) -> None:
    if not condition:
        raise UserError(f"config.{path}={value!r}: expected {expected}")
