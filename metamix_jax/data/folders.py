"""Folders of images as data sets: DATA_DIR/SPLIT/CLASS/IMAGE, as ImageNet is usually unpacked."""

import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from metamix_jax.errors import UserError, suggestion

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
EVALUATION_FOLDERS = ("val", "validation", "valid", "test")  # in this order, for the default split
HELD_OUT = 10  # percent of every class, where there is no folder to evaluate on
_SPLIT = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<low>\d{0,3})%?:(?P<high>\d{0,3})%?\])?")


@dataclasses.dataclass(frozen=True)
class Slice:
    """Images of one folder: those between two percentages of every class."""

    folder: Path
    low: int = 0
    high: int = 100

    def __str__(self) -> str:
        whole = (self.low, self.high) == (0, 100)
        return self.folder.name if whole else f"{self.folder.name}[{self.low}%:{self.high}%]"


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Labelled image files, read by index.

    paths: relative to `folder`.
    labels: int32 [n].
    """

    folder: Path
    paths: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns `image` as encoded bytes and `label`; raises UserError for unreadable files."""
        return [
            {"image": self._read(self.paths[index]), "label": int(self.labels[index])}
            for index in indices
        ]

    def where(self, index: int) -> str:
        """Returns the path of a file, for error messages."""
        return str(self.folder / self.paths[index])

    def _read(self, path: str) -> bytes:
        try:
            return (self.folder / path).read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.folder / path}: cannot be read ({error.strerror}); copy the data again"
            ) from error


def open_folder(
    config_data: ConfigDict,
) -> tuple[Callable[[str], ImageFiles], tuple[str, ...], tuple[str, str]]:
    """Returns a function from "train_split" or "eval_split" to its files; classes; split names.

    Classes are the sorted names of the training split's folders. Splits may be slices, such as
    train[:90%], of every class in an order that is random but always the same. Without a folder
    for the default evaluation split, the last HELD_OUT percent of every class are held out.

    Raises:
      UserError: no such folder, no images in a class, or another number of classes than
        config.data.num_classes.
    """
    slices = _slices(config_data)
    classes = _classes(slices["train_split"].folder)
    if len(classes) != config_data.num_classes:
        raise UserError(
            f"config.data.num_classes={config_data.num_classes}: {slices['train_split'].folder} "
            f"has {len(classes)} classes ({_listed(classes)}); set "
            f"config.data.num_classes={len(classes)}"
        )
    for key, found in slices.items():
        logging.info("config.data.%s: %s in %s", key, found, found.folder.parent)
    names = str(slices["train_split"]), str(slices["eval_split"])
    return lambda key: _list_images(slices[key], classes), classes, names


def _slices(config_data: ConfigDict) -> dict[str, Slice]:
    text = config_data.data_dir
    if not text:
        raise UserError("config.data.data_dir='': expected the folder of the images")
    root = Path(text).expanduser()
    if not root.is_dir():
        raise UserError(
            f"config.data.data_dir={text!r}: no such folder; expected one with train/CLASS/IMAGE, "
            "or CLASS/IMAGE"
        )
    train = _slice(root, config_data.train_split, "train_split", ("train", "."))
    name = config_data.eval_split
    wanted = (name, *EVALUATION_FOLDERS) if name == "test" else (name,)
    if name == "test" and not any((root / place).is_dir() for place in wanted):
        if (train.low, train.high) != (0, 100):
            raise UserError(
                f"config.data.eval_split={name!r}: no such folder in {root}; expected the rest of "
                f"config.data.train_split={config_data.train_split!r}, e.g. train[90%:]"
            )
        kept = 100 - HELD_OUT
        return {
            "train_split": Slice(train.folder, 0, kept),
            "eval_split": Slice(train.folder, kept, 100),
        }
    return {"train_split": train, "eval_split": _slice(root, name, "eval_split", wanted)}


def _slice(root: Path, text: str, key: str, places: Sequence[str]) -> Slice:
    """Returns a split; its folder is the first of `places` if it has one of these names."""
    match = _SPLIT.fullmatch(text)
    if not match:
        raise UserError(
            f"config.data.{key}={text!r}: expected a folder or a slice of one, e.g. train[:90%]"
        )
    name = match["name"]
    places = places if name in places else (name, ".") if name == "train" else (name,)
    folder = next((root / place for place in places if (root / place).is_dir()), None)
    if folder is None:
        hint = suggestion(name, _folders(root))
        raise UserError(f"config.data.{key}={text!r}: no such folder in {root}; {hint}")
    low, high = int(match["low"] or 0), min(int(match["high"] or 100), 100)
    if low >= high:
        raise UserError(f"config.data.{key}={text!r}: empty; expected a slice such as [:90%]")
    return Slice(folder, low, high)


def _classes(folder: Path) -> tuple[str, ...]:
    classes = tuple(_folders(folder))
    if not classes:
        raise UserError(f"{folder}: no folders in it; expected one for every class, with images")
    return classes


def _folders(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _list_images(part: Slice, classes: Sequence[str]) -> ImageFiles:
    known = {name: label for label, name in enumerate(classes)}
    paths, labels, others = [], [], 0
    for name in _folders(part.folder):
        if name not in known:
            raise UserError(
                f"{part.folder / name}: a class without training images; expected one of "
                f"{_listed(classes)}"
            )
        found, ignored = _images_below(part.folder, name)
        if not found:
            raise UserError(
                f"{part.folder / name}: no images ({', '.join(SUFFIXES)}); add some or remove the "
                "folder"
            )
        chosen = _between(found, part.low, part.high)
        paths += chosen
        labels += [known[name]] * len(chosen)
        others += ignored
    if others:
        logging.warning("%s: %d files that are not %s left out", part.folder, others,
                        ", ".join(SUFFIXES))  # fmt: skip
    if not paths:
        raise UserError(f"{part}: no images; expected at least 1, take a larger slice")
    return ImageFiles(part.folder, paths, np.array(labels, np.int32))


def _images_below(folder: Path, name: str) -> tuple[list[str], int]:
    """Returns the sorted images below a class's folder, and how many other files there are."""
    images, others = [], 0
    for place, folders, files in os.walk(folder / name, followlinks=True):
        folders.sort()
        below = os.path.relpath(place, folder)
        for file in files:
            if file.startswith("."):
                continue
            if file.lower().endswith(SUFFIXES):
                images.append(f"{below}/{file}")
            else:
                others += 1
    return sorted(images), others


def _between(paths: list[str], low: int, high: int) -> list[str]:
    """Returns a share of the paths in percent, sorted; a random one, but always the same."""
    if (low, high) == (0, 100):
        return paths
    keys = np.random.Philox(key=np.array([0, len(paths)], np.uint64)).random_raw(len(paths))
    order = np.argsort(keys, kind="stable")
    start, stop = (math.floor(len(paths) * percent / 100 + 0.5) for percent in (low, high))
    return [paths[i] for i in sorted(order[start:stop])]


def _listed(classes: Sequence[str], most: int = 5) -> str:
    more = f" and {len(classes) - most} more" if len(classes) > most else ""
    return ", ".join(classes[:most]) + more
