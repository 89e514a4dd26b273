"""Data sets by name: labelled images that can be read by index, in memory or streamed."""

import concurrent.futures
import dataclasses
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from metamix_jax.errors import UserError, suggestion

DIGITS_HELD_OUT = 360  # of scikit-learn's 1797 digits


class Split(Protocol):
    """Labelled images that can be read by index."""

    def __len__(self) -> int:
        """Returns the number of examples."""

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns images uint8 [n, h, w, c] and labels int32 [n] of the examples `indices` [n]."""


@dataclasses.dataclass(frozen=True)
class MemorySplit:
    """A split held decoded in memory: `images` uint8 [n, h, w, c], `labels` int32 [n]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Split`."""
        return self.images[indices], self.labels[indices]


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
    """A split read, decoded and resized to `shape` (h, w, c) anew at each `gather`."""

    records: Sequence[bytes]
    parse: Callable[[bytes], dict[str, Any]]  # record -> `image` as encoded bytes, `label` as int
    shape: tuple[int, int, int]
    name: str  # for error messages
    pool: concurrent.futures.ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    )

    def __len__(self) -> int:
        return len(self.records)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Split`. Raises UserError for damaged files or images and for missing labels."""
        images = np.empty((len(indices), *self.shape), np.uint8)
        labels = np.empty(len(indices), np.int32)

        def fill(rows: np.ndarray) -> None:
            # One read for all rows: record by record costs more than decoding small images does.
            try:
                records = self.records.__getitems__(indices[rows].tolist())
                if not all(records):  # what array_record makes of some files that were cut short
                    raise RuntimeError("empty records")
            except RuntimeError as error:  # array_record's word for missing and damaged files
                raise UserError(
                    f"{self.name}: cannot be read ({_first_line(error)}); copy the files again"
                ) from error
            for row, example in zip(rows, map(self.parse, records), strict=True):
                where = f"{self.name}, example {indices[row]}"
                images[row] = _decode(example["image"], self.shape, where)
                labels[row] = example["label"]
                if labels[row] < 0:
                    raise UserError(f"{where}: has no label; choose a labelled split")

        list(self.pool.map(fill, np.array_split(np.arange(len(indices)), os.cpu_count() or 1)))
        return images, labels


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The two splits that a run reads."""

    train: Split
    evaluation: Split


def load(config_data: ConfigDict) -> Dataset:
    """Returns the data set that `config.data` names, small splits decoded in memory.

    "digits" is scikit-learn's, split once and for all: 1437 "train", 360 "test", stratified. Any
    other name is a prepared TFDS data set with features `image` and `label`. Raises UserError.
    """
    open_split = (_open_digits if config_data.name == "digits" else _open_tfds)(config_data)
    # Both are opened before either is read: a mistake in the second shows at once.
    splits = {key: open_split(key) for key in ("train_split", "eval_split")}
    limit = config_data.in_memory_gib * 2**30
    for key, split in splits.items():
        if isinstance(split, StreamedSplit) and len(split) * math.prod(split.shape) <= limit:
            splits[key] = _read(split)
    return Dataset(splits["train_split"], splits["eval_split"])


def _open_digits(config_data: ConfigDict) -> Callable[[str], Split]:
    import sklearn.datasets
    import sklearn.model_selection

    for key, expected in (("image_size", 8), ("channels", 1), ("num_classes", 10)):
        if config_data[key] != expected:
            raise UserError(f"config.data.{key}={config_data[key]}: expected {expected} for digits")
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

    name, size, channels = config_data.name, config_data.image_size, config_data.channels
    if channels not in (1, 3):
        raise UserError(f"config.data.channels={channels}: expected 1 (grey) or 3 (RGB)")
    builder = _tfds_builder(name, config_data.data_dir)
    features = builder.info.features
    for key, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        if not isinstance(dict(features).get(key), kind):
            raise UserError(
                f"config.data.name={name!r}: expected a feature {key!r} of type {kind.__name__}; "
                f"this data set has {', '.join(sorted(features))}"
            )
    classes = features["label"].num_classes
    if classes != config_data.num_classes:
        raise UserError(
            f"config.data.num_classes={config_data.num_classes}: {name!r} has {classes} classes; "
            f"set config.data.num_classes={classes}"
        )
    # Only what is needed is parsed. Decoding images here rather than in TFDS gives the same pixels
    # whether or not OpenCV is installed.
    needed = tfds.features.FeaturesDict({key: features[key] for key in ("image", "label")})
    skip_image = {"image": tfds.decode.SkipDecoding()}
    parse = functools.partial(needed.deserialize_example_np, decoders=skip_image)

    def open_split(key: str) -> Split:
        what = f"config.data.{key}={config_data[key]!r}"
        records = _tfds_records(builder, config_data[key], what)
        return StreamedSplit(records, parse, (size, size, channels), f"{name} {config_data[key]}")

    return open_split


def _tfds_records(builder: Any, split: str, what: str) -> Sequence[bytes]:
    import tensorflow_datasets as tfds

    known = builder.info.splits
    try:
        # TFDS raises ValueError, KeyError or AssertionError for a split that cannot be had.
        examples = known[split].num_examples
    except Exception as error:
        raise UserError(
            f"{what}: no such split ({_first_line(error)}); {suggestion(split, known)}, or a slice "
            "such as train[:90%]"
        ) from error
    if not examples:
        raise UserError(f"{what}: has no examples; expected at least 1")
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        return builder.as_data_source(split, deserialize_method=raw)
    except NotImplementedError as error:
        raise UserError(
            f"{what}: {builder.data_path} is in a format without random access (tfrecord); expected"
            " an array_record copy: convert it where TensorFlow is installed with python -m "
            "tensorflow_datasets.scripts.convert_format --out_file_format=array_record "
            f"--dataset_version_dir={builder.data_path} --out_dir=NEW_DATA_DIR/"
            f"{builder.info.full_name}"
        ) from error
    except Exception as error:  # array_record and the file systems raise many kinds
        raise UserError(
            f"{what}: cannot be read in {builder.data_path} ({_first_line(error)}); prepare or copy"
            " the data set again"
        ) from error


def _tfds_builder(name: str, data_dir: str) -> Any:
    """Returns the TFDS builder of a data set that lies ready in `data_dir`."""
    import tensorflow_datasets as tfds
    from etils import epath  # also knows gs://

    folder = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if data_dir and not folder.is_dir():
        raise UserError(
            f"config.data.data_dir={data_dir!r}: no such folder; expected the one TFDS data sets "
            "lie in (it holds <name>/<version>/dataset_info.json)"
        )
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    hint = suggestion(name, {"digits", *found})
    try:
        builder = tfds.builder(name, data_dir=folder)
    except Exception as error:  # ValueError, AssertionError, ImportError, ... by what is wrong
        raise UserError(
            f"config.data.name={name!r}: not a data set in {folder} ({_first_line(error)}); {hint}"
        ) from error
    if not (builder.data_path / "dataset_info.json").exists():
        raise UserError(
            f"config.data.name={name!r}: not prepared in {builder.data_path}; set "
            f"config.data.data_dir, or prepare it with tfds.builder({name!r}, data_dir="
            f"{str(folder)!r}).download_and_prepare(file_format='array_record'); {hint}"
        )
    return builder


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _decode(encoded: bytes, shape: tuple[int, int, int], where: str) -> np.ndarray:
    from PIL import Image

    height, width, channels = shape
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image = image.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{where}: its {len(encoded)} bytes are no image that Pillow can decode; "
            "prepare or copy the data set again"
        ) from error
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(shape)


def _read(split: StreamedSplit, chunk: int = 1024) -> MemorySplit:
    """Reads all of `split` into memory, with a progress bar where someone watches."""
    from tqdm import tqdm

    images = np.empty((len(split), *split.shape), np.uint8)
    labels = np.empty(len(split), np.int32)
    bar = tqdm(total=len(split), desc=f"reading {split.name}", unit="image", leave=False,
               disable=None, file=sys.stderr)  # fmt: skip
    with bar, split.pool:
        for start in range(0, len(split), chunk):
            rows = np.arange(start, min(start + chunk, len(split)))
            images[rows], labels[rows] = split.gather(rows)
            bar.update(len(rows))
    return MemorySplit(images, labels)
