"""Splits: labelled images read by index, in memory or streamed."""

import concurrent.futures
import dataclasses
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from metamix_jax.data.images import DamagedImageError, Transform, UnsupportedImageError
from metamix_jax.errors import UserError


class Split(Protocol):
    """Labelled images read by index."""

    def __len__(self) -> int:
        """Returns the number of examples."""

    def gather(
        self, indices: np.ndarray, epochs: np.ndarray | int = 0, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns images uint8 [n, h, w, c] and labels int32 [n] of the examples `indices` [n].

        Augmentation while decoding, if any, depends on `seed` and their `epochs` [n].
        """

    def labels_at(self, indices: np.ndarray) -> np.ndarray:
        """Returns the labels int32 [n] of the examples `indices` [n] without decoding images."""


@dataclasses.dataclass(frozen=True)
class MemorySplit:
    """A split decoded in memory: `images` uint8 [n, h, w, c], `labels` int32 [n]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def gather(
        self, indices: np.ndarray, epochs: np.ndarray | int = 0, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Split`."""
        return self.images[indices], self.labels[indices]

    def labels_at(self, indices: np.ndarray) -> np.ndarray:
        """See `Split`."""
        return self.labels[indices]


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
    """A split that is read, decoded and transformed at each `gather`."""

    records: Any  # has __len__ and __getitems__
    parse: Callable[
        [Any], dict[str, Any]
    ]  # record -> `image`, as a Transform takes it, and `label`
    transform: Transform
    name: str  # for error messages
    num_classes: int
    where: Callable[[int], str] | None = None  # an example's file, for error messages
    # How many examples with damaged images to replace; None: none, as in evaluation.
    max_bad_examples: int | None = None
    pool: concurrent.futures.ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    )
    bad_examples: set[int] = dataclasses.field(default_factory=set, init=False)  # seen so far
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, init=False)

    def __len__(self) -> int:
        return len(self.records)

    def gather(
        self, indices: np.ndarray, epochs: np.ndarray | int = 0, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Split`. Raises UserError for damaged files or images and for invalid labels."""
        images = np.empty((len(indices), *self.transform.shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        epochs = np.broadcast_to(epochs, len(indices))

        def fill(rows: np.ndarray) -> None:
            # One read for all rows: reading record by record costs more than decoding small images.
            examples = self._examples(indices[rows].tolist())
            for row, example in zip(rows, examples, strict=True):
                turn = {"index": int(indices[row]), "epoch": int(epochs[row]), "seed": seed}
                images[row], labels[row] = self._decode(example, **turn)

        list(self.pool.map(fill, np.array_split(np.arange(len(indices)), os.cpu_count() or 1)))
        return images, labels

    def labels_at(self, indices: np.ndarray) -> np.ndarray:
        """See `Split`. Raises UserError for damaged files and invalid labels."""
        examples = zip(indices.tolist(), self._examples(indices.tolist()), strict=True)
        return np.array([self._label(example, index) for index, example in examples], np.int32)

    def _examples(self, indices: list[int]) -> Iterator[dict[str, Any]]:
        try:
            records = self.records.__getitems__(indices)
            if not all(records):  # array_record returns these for some truncated files
                raise RuntimeError("empty records")
        except RuntimeError as error:  # array_record's error for missing and damaged files
            raise UserError(
                f"{self.name}: cannot be read ({first_line(error)}); copy the files again"
            ) from error
        return map(self.parse, records)

    def _decode(
        self, example: dict[str, Any], *, index: int, epoch: int, seed: int
    ) -> tuple[np.ndarray, int]:
        """Returns image and label of an example, or of the next one with an intact image."""
        try:
            image = self.transform(example["image"], seed=seed, epoch=epoch, index=index)
        except DamagedImageError as error:
            self._count_bad(index, example["image"], error)
            # A fixed replacement keeps batches a function of (seed, step).
            index = (index + 1) % len(self)
            (example,) = self._examples([index])
            return self._decode(example, index=index, epoch=epoch, seed=seed)
        except UnsupportedImageError as error:
            raise UserError(
                f"{self._place(index)}: {error}; convert the data set's images"
            ) from error
        return image, self._label(example, index)

    def _label(self, example: dict[str, Any], index: int) -> int:
        label = example["label"]
        if label < 0:
            raise UserError(f"{self._place(index)}: no label; use a labelled split")
        if label >= self.num_classes:
            raise UserError(
                f"{self._place(index)}: label {label}; expected 0 to "
                f"{self.num_classes - 1}, because config.data.num_classes={self.num_classes}"
            )
        return label

    def _place(self, index: int) -> str:
        file = f" ({self.where(index)})" if self.where else ""
        return f"{self.name}, example {index}{file}"

    def _count_bad(self, index: int, image: Any, error: DamagedImageError) -> None:
        """Logs an example with a damaged image, or raises UserError if there are too many."""
        allowed, hint = 0, ""
        if self.max_bad_examples is not None:
            allowed = min(self.max_bad_examples, len(self) - 1)  # one must remain as replacement
            hint = f", or raise config.data.max_bad_examples (currently {self.max_bad_examples})"
        with self._lock:
            known = index in self.bad_examples
            self.bad_examples.add(index)
            count = len(self.bad_examples)
        size = f" ({len(image)} bytes)" if isinstance(image, bytes) else ""
        what = f"{self._place(index)}: not a decodable image{size}"
        if count > allowed:
            raise UserError(f"{what}; prepare or copy the data set again{hint}") from error
        if not known:
            logging.warning("%s; replaced by the next (%d of %d allowed)", what, count, allowed)


def read_into_memory(split: StreamedSplit, chunk: int = 1024) -> MemorySplit:
    """Decodes all of `split` into memory, with a progress bar on a terminal."""
    from tqdm import tqdm

    images = np.empty((len(split), *split.transform.shape), np.uint8)
    labels = np.empty(len(split), np.int32)
    bar = tqdm(total=len(split), desc=f"reading {split.name}", unit="image", leave=False,
               disable=None, file=sys.stderr)  # fmt: skip
    with bar, split.pool:
        for start in range(0, len(split), chunk):
            rows = np.arange(start, min(start + chunk, len(split)))
            images[rows], labels[rows] = split.gather(rows)
            bar.update(len(rows))
    return MemorySplit(images, labels)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
