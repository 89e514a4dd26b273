"""Images and labels: reading them, the order they are trained in, and their augmentation.

A training batch is a pure function of (seed, step): the order is a fixed permutation per epoch and
augmentation is keyed by (seed, epoch, example). So a resumed run, or one on any number of devices
and processes, sees the very same global batches, and no iterator state has to be saved.
"""

import concurrent.futures
import dataclasses
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
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


def train_indices(
    examples: int, *, seed: int, step: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which examples the global batch of `step` holds, and in which epoch each falls.

    Both are [batch_size], indices int64 and epochs int32. Batches run on across the end of an
    epoch, so each epoch holds every example exactly once.
    """
    epochs, offsets = np.divmod(step * batch_size + np.arange(batch_size), examples)
    indices = np.empty(batch_size, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        rows = epochs == epoch
        indices[rows] = _permutation(examples, seed, epoch)[offsets[rows]]
    return indices, epochs.astype(np.int32)


@functools.lru_cache(maxsize=4)
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy promises that Philox's raw stream stays; Generator.permutation may change by version.
    keys = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(examples)
    return np.argsort(keys, kind="stable")


def train_batches(
    split: Split,
    *,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns this process's part of the global batches of steps start..stop-1, read ahead.

    Each is `image` uint8 [b, h, w, c] and int32 [b] `label`, `index` (which example) and `epoch`,
    where b = batch_size / process_count. Raises UserError where that is no whole number.
    """
    rows = _process_rows(batch_size, process_index, process_count, "batch_size")

    def load_step(step: int) -> dict[str, np.ndarray]:
        indices, epochs = train_indices(len(split), seed=seed, step=step, batch_size=batch_size)
        images, labels = split.gather(indices[rows])
        index = indices[rows].astype(np.int32)
        return {"image": images, "label": labels, "index": index, "epoch": epochs[rows]}

    return _read_ahead(load_step, start, stop)


def eval_batches(
    split: Split, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Returns this process's part of batches that hold every example of `split` exactly once.

    Each is `image` uint8 [b, h, w, c], `label` int32 [b] and `mask` bool [b], False where the last
    global batch is padded (with zeros); b = batch_size / process_count, and all processes get the
    same number of batches. Raises UserError where b is no whole number.
    """
    rows = _process_rows(batch_size, process_index, process_count, "eval.batch_size")

    def load_step(step: int) -> dict[str, np.ndarray]:
        positions = np.arange(step * batch_size, (step + 1) * batch_size)[rows]
        mask = positions < len(split)
        images, labels = split.gather(positions[mask])
        missing = int(np.sum(~mask))
        images = np.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1))
        return {"image": images, "label": np.pad(labels, (0, missing)), "mask": mask}

    return _read_ahead(load_step, 0, -(-len(split) // batch_size))


def _process_rows(batch_size: int, process_index: int, process_count: int, key: str) -> slice:
    if batch_size % process_count:
        raise UserError(f"config.{key}={batch_size}: expected a multiple of {process_count}, the "
                        "number of processes")  # fmt: skip
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _read_ahead(load_step: Callable[[int], dict], start: int, stop: int) -> Iterator[dict]:
    import grain

    steps = grain.MapDataset.range(start, stop).map(load_step)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(steps.to_iter_dataset(options))


def preprocess(
    images: jax.Array, *, mean: Sequence[float], std: Sequence[float], dtype: Any = jnp.float32
) -> jax.Array:
    """Returns (x / 255 - mean) / std of uint8 images [b, h, w, c]; mean, std: per channel or one.

    Computed in float32, then cast to `dtype`.
    """
    shape = (1, 1, 1, -1)
    shifted = images.astype(jnp.float32) / 255 - jnp.asarray(mean, jnp.float32).reshape(shape)
    return (shifted / jnp.asarray(std, jnp.float32).reshape(shape)).astype(dtype)


def augment(
    images: jax.Array, index: jax.Array, epoch: jax.Array, *, seed: int, kind: str
) -> jax.Array:
    """Returns uint8 images [b, h, w, c] cropped and mirrored at random; see config.data.augment.

    What happens to an image depends on seed, its `index` and its `epoch` (int32 [b]) alone, not on
    its place in the batch nor on the device. Padding is 1/8 of the size per side (CIFAR's 4 of 32),
    of pixels with value 0 before normalisation, the usual recipe.
    """
    if kind == "none":
        return images
    if kind not in ("crop", "crop_flip"):
        raise ValueError(f"augment {kind!r}: expected none, crop or crop_flip")
    _, height, width, channels = images.shape
    top, left = height // 8, width // 8
    # By name: under the "rbg" generator results inside vmap depend on the place in the batch.
    seed_key = jax.random.key(seed, impl="threefry2x32")

    def augment_one(image: jax.Array, index: jax.Array, epoch: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(seed_key, epoch), index)
        row_key, column_key, mirror_key = jax.random.split(key, 3)
        row = jax.random.randint(row_key, (), 0, 2 * top + 1)
        column = jax.random.randint(column_key, (), 0, 2 * left + 1)
        padded = jnp.pad(image, ((top, top), (left, left), (0, 0)))
        image = jax.lax.dynamic_slice(padded, (row, column, 0), (height, width, channels))
        if kind == "crop":
            return image
        return jnp.where(jax.random.bernoulli(mirror_key), image[:, ::-1], image)

    return jax.vmap(augment_one)(images, index, epoch)
