"""Batching: shuffling, augmentation and normalization.

A training batch is a pure function of (seed, step): the order is a fixed permutation per epoch, and
augmentation, on the device or while decoding (images.py), is keyed by (seed, epoch, example).
Resumed runs, and runs on any number of devices and processes, therefore see identical global
batches, and no iterator state needs to be checkpointed.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metamix_jax.data.datasets import DECODING_AUGMENT
from metamix_jax.data.splits import Split
from metamix_jax.errors import UserError


def train_indices(
    examples: int, *, seed: int, step: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples in the global batch of `step` and the epoch of each.

    Both are [batch_size], indices int64 and epochs int32. Batches may span two or more epochs;
    each epoch contains every example exactly once.
    """
    epochs, offsets = np.divmod(step * batch_size + np.arange(batch_size), examples)
    indices = np.empty(batch_size, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        rows = epochs == epoch
        indices[rows] = _permutation(examples, seed, epoch)[offsets[rows]]
    return indices, epochs.astype(np.int32)


@functools.lru_cache(maxsize=4)
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    # NumPy guarantees Philox's raw stream; Generator.permutation may change between versions.
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
    images: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns this process's part of the global batches of steps start..stop-1, prefetched.

    Each has `image` uint8 [b, h, w, c] and int32 [b] `label`, `index` (of the example) and `epoch`,
    with b = batch_size / process_count; without `images`, only `index` and `epoch`. Raises
    UserError if b is not an integer.
    """
    rows = _process_rows(batch_size, process_index, process_count, "batch_size")

    def choose(step: int) -> tuple[np.ndarray, np.ndarray]:
        indices, epochs = train_indices(len(split), seed=seed, step=step, batch_size=batch_size)
        return indices[rows], epochs[rows]

    def named(indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        return {"index": indices.astype(np.int32), "epoch": epochs}

    def load_step(step: int) -> dict[str, np.ndarray]:
        indices, epochs = choose(step)
        found, labels = split.gather(indices, epochs, seed)
        return {"image": found, "label": labels, **named(indices, epochs)}

    if not images:
        return (named(*choose(step)) for step in range(start, stop))
    return _read_ahead(load_step, start, stop)


def eval_batches(
    split: Split, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Returns this process's part of batches that contain every example of `split` exactly once.

    Each has `image` uint8 [b, h, w, c], `label` int32 [b] and `mask` bool [b], False where the last
    global batch is zero-padded; b = batch_size / process_count, and all processes get the same
    number of batches. Raises UserError if b is not an integer.
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
    """Returns (x / 255 - mean) / std for uint8 images [b, h, w, c]; mean, std: per channel or one.

    Computed in float32, then cast to `dtype`.
    """
    shape = (1, 1, 1, -1)
    shifted = images.astype(jnp.float32) / 255 - jnp.asarray(mean, jnp.float32).reshape(shape)
    return (shifted / jnp.asarray(std, jnp.float32).reshape(shape)).astype(dtype)


def augment(
    images: jax.Array, index: jax.Array, epoch: jax.Array, *, seed: int, kind: str
) -> jax.Array:
    """Returns uint8 images [b, h, w, c], randomly cropped and flipped; see config.data.augment.

    The randomness depends only on the seed and on each image's `index` and `epoch` (int32 [b]), not
    on its position in the batch or the device. Crops are taken from the image zero-padded (before
    normalization) by 1/8 of its size per side, e.g. CIFAR's 4 of 32.
    """
    if kind in ("none", DECODING_AUGMENT):
        return images
    if kind not in ("crop", "crop_flip"):
        raise ValueError(
            f"augment {kind!r}: expected none, crop, crop_flip, or {DECODING_AUGMENT}, "
            "which is applied while decoding"
        )
    _, height, width, channels = images.shape
    top, left = height // 8, width // 8
    # Explicit, because with "rbg" results inside vmap depend on the position in the batch.
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
