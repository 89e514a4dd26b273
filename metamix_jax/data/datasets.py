"""Data sets by name: scikit-learn's digits, folders of images, TFDS; or given from Python."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from metamix_jax.data import folders, sources
from metamix_jax.data.images import RandomResizedCropFlip, Resize
from metamix_jax.data.splits import MemorySplit, Split, StreamedSplit, first_line, read_into_memory
from metamix_jax.errors import UserError, suggestion

DIGITS_HELD_OUT = 360  # of scikit-learn's 1797 digits
_SAMPLED_LABELS = 64
DECODING_AUGMENT = "random_resized_crop_flip"  # the config.data.augment applied while decoding


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The training and evaluation splits of a run.

    class_names: in the order of the labels; empty where they are not known.
    split_names: of both, where config.data does not say which they are.
    """

    train: Split
    evaluation: Split
    class_names: tuple[str, ...] = ()
    split_names: tuple[str, str] | None = None


def load(config_data: ConfigDict, given: tuple[Any, Any] | None = None) -> Dataset:
    """Returns the data set named by `config.data`; small splits are decoded into memory.

    "digits" is scikit-learn's, with a fixed stratified split: 1437 "train", 360 "test". "folder"
    is config.data.data_dir/SPLIT/CLASS/IMAGE (folders.py). Any other name is a prepared TFDS data
    set with features `image` and `label`. Raises UserError.

    Args:
      config_data: the section `data`.
      given: sources to train and to evaluate on (sources.py), in place of a name.
    """
    class_names, split_names = (), None
    if given is not None:
        open_split = _open_given(config_data, given)
    elif config_data.name == sources.NAME:
        raise UserError(
            f"config.data.name={sources.NAME!r}: the data of this run were given from Python; give "
            "them again, as `data`"
        )
    elif config_data.name == "folder":
        open_split, class_names, split_names = _open_folder(config_data)
    else:
        open_split = (_open_digits if config_data.name == "digits" else _open_tfds)(config_data)
    # Open both before reading either, so that a mistake in the second shows immediately.
    splits = {key: open_split(key) for key in ("train_split", "eval_split")}
    limit = config_data.in_memory_gib * 2**30
    for key, split in splits.items():
        # Random crops differ in every epoch and cannot be cached.
        fixed = isinstance(split, StreamedSplit) and isinstance(split.transform, Resize)
        if fixed and len(split) * math.prod(split.transform.shape) <= limit:
            splits[key] = read_into_memory(split)
    return Dataset(splits["train_split"], splits["eval_split"], class_names, split_names)


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """Returns what identifies a data set: split sizes and a digest of sampled labels.

    The labels of up to 64 examples, evenly spaced over each split, detect a data set of the same
    size with other examples or another order.
    """
    facts = {
        name: {"examples": len(split), "labels": _labels_digest(split)}
        for name, split in (("train", dataset.train), ("evaluation", dataset.evaluation))
    }
    if dataset.class_names:
        facts["classes"] = list(dataset.class_names)
    if dataset.split_names:
        facts["splits"] = list(dataset.split_names)
    return facts


def _labels_digest(split: Split) -> str:
    positions = np.linspace(0, len(split) - 1, min(len(split), _SAMPLED_LABELS)).astype(np.int64)
    return hashlib.sha256(split.labels_at(positions).astype("<i4").tobytes()).hexdigest()[:16]


def _open_digits(config_data: ConfigDict) -> Callable[[str], Split]:
    import sklearn.datasets
    import sklearn.model_selection

    expected = {"image_size": 8, "channels": 1, "num_classes": 10, "eval_resize": 0}
    for key, value in expected.items():
        if config_data[key] != value:
            raise UserError(f"config.data.{key}={config_data[key]}: expected {value} for digits")
    if config_data.augment == DECODING_AUGMENT:
        raise UserError(
            f"config.data.augment={config_data.augment!r}: expected none, crop or crop_flip for "
            "digits"
        )
    digits = sklearn.datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # were 0..16
    labels = digits.target.astype(np.int32)
    train, test = sklearn.model_selection.train_test_split(
        np.arange(len(labels)), test_size=DIGITS_HELD_OUT, stratify=labels, random_state=0
    )
    splits = {"train": train, "test": test}

    def open_split(key: str) -> Split:
        name = config_data[key]
        if name not in splits:
            raise UserError(
                f"config.data.{key}={name!r}: no such split; {suggestion(name, splits)}"
            )
        return MemorySplit(images[splits[name]], labels[splits[name]])

    return open_split


def _open_tfds(config_data: ConfigDict) -> Callable[[str], Split]:
    import tensorflow_datasets as tfds

    name = config_data.name
    _check_channels(config_data)
    builder = _tfds_builder(name, config_data.data_dir)
    features = builder.info.features
    for key, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        if not isinstance(dict(features).get(key), kind):
            raise UserError(
                f"config.data.name={name!r}: expected a feature {key!r} of type {kind.__name__}; "
                f"this data set has {', '.join(sorted(features))}"
            )
    kind = np.dtype(features["image"].np_dtype)
    if kind not in (np.uint8, np.uint16):
        raise UserError(
            f"config.data.name={name!r}: images of type {kind}, whose range is not defined; "
            "expected uint8 or uint16: prepare the data set again with such images"
        )
    classes = features["label"].num_classes  # None, or 0 in files: not stated
    if classes and classes != config_data.num_classes:
        raise UserError(
            f"config.data.num_classes={config_data.num_classes}: {name!r} has {classes} classes; "
            f"set config.data.num_classes={classes}"
        )
    # Parse only the needed features. TFDS would decode images with OpenCV where that is installed;
    # decoding them here gives the same pixels everywhere.
    needed = tfds.features.FeaturesDict({key: features[key] for key in ("image", "label")})
    skip_image = {"image": tfds.decode.SkipDecoding()}
    parse = functools.partial(needed.deserialize_example_np, decoders=skip_image)

    def open_split(key: str) -> Split:
        what = f"config.data.{key}={config_data[key]!r}"
        records = _tfds_records(builder, config_data[key], what)
        return _streamed(config_data, key, records, parse, f"{name} {config_data[key]}")

    return open_split


def _open_folder(
    config_data: ConfigDict,
) -> tuple[Callable[[str], Split], tuple[str, ...], tuple[str, str]]:
    _check_channels(config_data)
    open_files, class_names, split_names = folders.open_folder(config_data)

    def open_split(key: str) -> Split:
        files = open_files(key)
        name = f"{config_data.data_dir} {config_data[key]}"
        return _streamed(config_data, key, files, dict, name, files.where)

    return open_split, class_names, split_names


def _open_given(config_data: ConfigDict, given: tuple[Any, Any]) -> Callable[[str], Split]:
    _check_channels(config_data)
    try:
        train, evaluation = given
    except (TypeError, ValueError):
        raise UserError("data: expected a pair, (to train on, to evaluate on)") from None
    named = {"train_split": (train, "training data"), "eval_split": (evaluation, "evaluation data")}

    def open_split(key: str) -> Split:
        source = sources.open_source(*named[key])
        return _streamed(config_data, key, source, dict, source.name)

    return open_split


def _check_channels(config_data: ConfigDict) -> None:
    if config_data.channels not in (1, 3):
        raise UserError(
            f"config.data.channels={config_data.channels}: expected 1 (grey) or 3 (RGB)"
        )


def _streamed(
    config_data: ConfigDict,
    key: str,
    records: Any,
    parse: Callable[[Any], dict[str, Any]],
    name: str,
    where: Callable[[int], str] | None = None,
) -> StreamedSplit:
    """Returns a split with the transform that `config.data` asks for."""
    shape = (config_data.image_size, config_data.image_size, config_data.channels)
    transform, max_bad_examples = Resize(shape, config_data.eval_resize), None
    if key == "train_split":
        max_bad_examples = config_data.max_bad_examples
        if config_data.augment == DECODING_AUGMENT:
            transform = RandomResizedCropFlip(shape)
    return StreamedSplit(
        records,
        parse,
        transform,
        name,
        config_data.num_classes,
        where,
        max_bad_examples,
    )


def _tfds_records(builder: Any, split: str, what: str) -> Sequence[bytes]:
    import tensorflow_datasets as tfds

    known = builder.info.splits
    try:
        # TFDS raises ValueError, KeyError or AssertionError for unknown splits.
        examples = known[split].num_examples
    except Exception as error:
        raise UserError(
            f"{what}: no such split ({first_line(error)}); {suggestion(split, known)}, or a slice, "
            "e.g. train[:90%]"
        ) from error
    if not examples:
        raise UserError(f"{what}: empty split; expected at least 1 example")
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        return builder.as_data_source(split, deserialize_method=raw)
    except NotImplementedError as error:
        raise UserError(
            f"{what}: {builder.data_path} has no random access (tfrecord); expected array_record, "
            "convert it with python -m metamix_jax.data.convert_tfrecord "
            f"{builder.data_path} NEW_DATA_DIR/{builder.info.full_name}"
        ) from error
    except Exception as error:  # array_record and the file systems raise many types
        raise UserError(
            f"{what}: cannot be read from {builder.data_path} ({first_line(error)}); prepare or "
            "copy the data set again"
        ) from error


def _tfds_builder(name: str, data_dir: str) -> Any:
    """Returns the TFDS builder of a data set already prepared in `data_dir`."""
    import tensorflow_datasets as tfds
    from etils import epath  # supports gs:// paths

    folder = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if data_dir and not folder.is_dir():
        raise UserError(
            f"config.data.data_dir={data_dir!r}: no such directory; expected the root of the TFDS "
            "data sets (it contains <name>/<version>/dataset_info.json)"
        )
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if data_dir and not _holds(folder, name):
        near = (folder.parent, folder.parent.parent, *(folder / entry for entry in found))
        root = next((place for place in near if _holds(place, name)), None)
        if root is not None:
            raise UserError(
                f"config.data.data_dir={data_dir!r}: not the directory that contains {name!r}; "
                f"set config.data.data_dir={str(root)!r}"
            )
    hint = suggestion(name, {"digits", *found})
    try:
        builder = tfds.builder(name, data_dir=folder)
    except Exception as error:  # ValueError, AssertionError, ImportError, ...
        raise UserError(
            f"config.data.name={name!r}: not a data set in {folder} ({first_line(error)}); {hint}"
        ) from error
    if not (builder.data_path / "dataset_info.json").exists():
        raise UserError(
            f"config.data.name={name!r}: not prepared in {builder.data_path}; set "
            f"config.data.data_dir, or prepare it with tfds.builder({name!r}, data_dir="
            f"{str(folder)!r}).download_and_prepare(file_format='array_record'); {hint}"
        )
    return builder


def _holds(root: Any, name: str) -> bool:
    """Returns whether a directory contains a TFDS data set of this name, in any version."""
    folder = root / (name.partition(":")[0] or "no name")
    return any(folder.glob("*/dataset_info.json")) or any(folder.glob("*/*/dataset_info.json"))
