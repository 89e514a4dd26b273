"""Every configuration field with its default and meaning, and the checks made before any work.

A file in `configs/` starts from `default()` and overrides. The ConfigDict is locked: a key that is
not here cannot be set, so no key is ever silently unread (tests/test_config.py holds that each key
here is read somewhere).
"""

import math
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.errors import UserError, suggestion

CHOICES = {
    "loss": ("cross_entropy", "distillation", "both"),
    "data.augment": ("none", "crop_flip", "crop", "random_resized_crop_flip"),
    "budget.unit": ("fraction", "gbops", "average_act_bits"),
    "search.searcher": ("metamix", "uniform", "none"),
    "quant.init_pass": ("full_precision", "lowest_bits"),
    "quant.init_rule": ("shifted", "unshifted", "mse"),
    "quant.positive_step": ("floor", "abs", "softplus"),
    "optimizer.name": ("adam", "sgd"),
    "bit_meta.loss": ("mean", "last"),
    "bit_search.budget_form": ("argmax", "expected"),
}

_RANGES = {
    "more than 0": (
        lambda value: value > 0,
        (
            "batch_size", "log_every_steps", "checkpoint_every_steps", "data.image_size",
            "data.channels", "data.num_classes", "eval.batch_size", "budget.value",
            "optimizer.eps", "optimizer.clip_norm",
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
            "data.eval_resize", "data.max_bad_examples",
        ),
    ),
    "0 or more and less than 1": (
        lambda value: 0 <= value < 1,
        ("optimizer.b1", "optimizer.b2", "bit_search.b1", "bit_search.b2"),
    ),
    "2 to 8": (lambda value: 2 <= value <= 8, ("quant.first_last_bits",)),
}  # fmt: skip


def default() -> ConfigDict:
    """Returns all fields with their defaults; `model`, `data` and the start are left to fill in.

    Hyper-parameters are those of MetaMix's recipe for MobileNet-v3 where the paper or its code
    state them.
    """
    config = ConfigDict()
    config.seed = 0  # network init, data order, augmentation, logit init
    config.batch_size = 256  # global, over all devices and processes
    config.loss = "cross_entropy"  # "distillation": soft targets only; "both": their sum
    config.checkpoint = ""  # evaluate: checkpoint directory or workdir; "" = the workdir's newest
    config.pretrained = ""  # .npz, .safetensors, .pth: start weights; "" = train them first
    config.log_every_steps = 20
    config.checkpoint_every_steps = 200

    # Keyword arguments of metamix_jax.models.make: `name` and what that network takes.
    config.model = ConfigDict({"name": ""}, allow_dotted_keys=False)
    config.data = ConfigDict(
        {
            "name": "",  # "digits", or any image-classification TFDS data set
            "data_dir": "",  # where TFDS data sets lie; "" = TFDS's default
            "train_split": "train",
            "eval_split": "test",
            "image_size": 32,  # height = width; other sizes are resized on reading
            "channels": 3,
            "num_classes": 10,
            "mean": (0.0,),  # per channel (or one for all), of pixels in [0, 1]
            "std": (1.0,),
            # "crop_flip": pad by 1/8, random crop, mirror; "crop": no mirror;
            # "random_resized_crop_flip": ImageNet's, of 8 to 100 % of the image.
            "augment": "none",
            # Shorter side before the centre crop to image_size, of all but the random resized
            # crops; 256 is usual for ImageNet at 224; 0 = resized straight to the square.
            "eval_resize": 0,
            "in_memory_gib": 4.0,  # decoded sets up to this size are read once and kept
            "max_bad_examples": 0,  # training images that may be damaged (each is replaced)
        }
    )
    config.eval = ConfigDict(
        {
            "batch_size": 500,
            "every_steps": 0,  # besides the end of each phase; 0 = only there
            "bn_reestimate_batches": 0,  # training batches to re-estimate BN statistics; 0 = off
        }
    )
    # Distillation teacher, run at full precision in evaluation mode.
    config.teacher = ConfigDict({"path": "", "model": ConfigDict({"name": ""})})
    config.quant = ConfigDict(
        {
            "act_bits": (8, 4, 3),  # candidate activation bit-widths
            "weight_bits": (4,),  # one width, or candidates: then each layer chooses a pair
            "first_last_bits": 8,  # activations and weights of the first and last layer
            "image_bits": 8,  # activations of the first layer, the image; 32 = not quantized
            "init_pass": "full_precision",  # "lowest_bits": each layer sees quantized inputs
            # LSQ's 2 mean|x| / sqrt(Qp); "unshifted": mean |x| before the hswish shift, and
            # Qp = 2^b - 1; "mse": least squared error, for --mode=calibrate above all.
            "init_rule": "shifted",
            "positive_step": "floor",  # how steps are kept positive
        }
    )
    config.budget = ConfigDict(
        {
            "value": 1.0,
            # "fraction" of the uniform 4/4 network's BOPs; "gbops"; "average_act_bits" weighted by
            # the number of input activations of each searched layer.
            "unit": "fraction",
        }
    )
    config.search = ConfigDict(
        {
            "searcher": "metamix",  # "uniform": no search; "none": full-precision training only
            "uniform_bits": 4,  # of searcher "uniform"
        }
    )
    config.optimizer = ConfigDict(
        {
            "name": "adam",
            "b1": 0.9,  # Adam's first decay; SGD's Nesterov momentum
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 5e-6,  # coupled (added to the gradient), convolution kernels only
            "clip_norm": 10.0,  # global gradient norm, weights and steps; not the logits
        }
    )
    # Phases. Lengths in epochs of the training split; 0 leaves the phase out.
    config.full_precision = ConfigDict({"epochs": 0.0, "learning_rate": 1e-3})  # cosine to 0
    config.bit_meta = ConfigDict(
        {
            "epochs": 1.0,
            "learning_rate": 1e-4,  # constant, also during the alternation
            "loss": "mean",  # "last": gradient of the widest branch only (a published code's)
        }
    )
    config.bit_search = ConfigDict(
        {
            "epochs": 1.0,  # each step follows one of bit-meta on the same batch
            "learning_rate": 1e-4,  # of the logits, constant
            "b1": 0.5,
            "b2": 0.999,
            "weight_decay": 1e-3,  # coupled, on the logits
            # lambda times the BOPs of uniform 4/4: the loss adds
            # budget_weight * |cost - budget| / cost(uniform 4/4).
            "budget_weight": 13.9,
            "budget_form": "argmax",  # Eq. 4 and 5; "expected": softmax-weighted cost
            # Ablations. False: no bit-meta steps between those of the search / the search's loss
            # trains weights and steps too.
            "alternate": True,
            "fixed_meta_state": True,
            "commit_batch_stats": False,  # True: this pass also moves the running statistics
        }
    )
    config.weight_training = ConfigDict(
        {
            "act_epochs": 18.0,  # stage 1: activations quantized, full-precision weights
            "epochs": 120.0,  # stage 2: both quantized
            "learning_rate": 5e-4,  # each stage: cosine to 0
        }
    )
    return config.lock()


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


def validate(config: ConfigDict) -> None:
    """Raises UserError for values that cannot work; needs no data and no devices."""
    for path, allowed in CHOICES.items():
        value = _get(config, path)
        _require(value in allowed, path, value, f"one of {', '.join(allowed)}")
    for expected, (holds, paths) in _RANGES.items():
        for path in paths:
            value = _get(config, path)
            _require(math.isfinite(value) and holds(value), path, value, expected)
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
    if config.search.searcher == "uniform":
        value = config.search.uniform_bits
        for name, bits in (("act_bits", act_bits), ("weight_bits", weight_bits)):
            _require(
                len(bits) == 1 or value in bits,
                "search.uniform_bits", value, f"one of quant.{name} {bits}",
            )  # fmt: skip
    if config.search.searcher == "metamix":
        value = config.bit_search.epochs
        _require(value > 0, "bit_search.epochs", value, "more than 0 for searcher metamix")
    if config.search.searcher == "none":
        value = config.full_precision.epochs
        _require(value > 0, "full_precision.epochs", value, "more than 0 for searcher none")
    else:
        value = config.weight_training.epochs
        _require(value > 0, "weight_training.epochs", value, "more than 0, or nothing would "
                 "quantize the weights")  # fmt: skip
    for path in ("mean", "std"):
        value = tuple(config.data[path])
        _require(
            len(value) in (1, config.data.channels) and all(map(math.isfinite, value)),
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
    if config.search.searcher != "none" and not config.pretrained:
        _require(
            config.full_precision.epochs > 0, "full_precision.epochs", config.full_precision.epochs,
            "more than 0, or config.pretrained naming trained weights to start from",
        )  # fmt: skip
    needs_teacher = config.loss != "cross_entropy"
    _require(
        bool(config.teacher.path) == needs_teacher, "teacher.path", config.teacher.path,
        f"{'a weight file or a workdir' if needs_teacher else 'nothing'} with loss={config.loss!r}",
    )  # fmt: skip


def _get(config: ConfigDict, path: str):
    for key in path.split("."):
        config = config[key]
    return config


def _require(condition: bool, path: str, value, expected: str) -> None:
    if not condition:
        raise UserError(f"config.{path}={value!r}: expected {expected}")
