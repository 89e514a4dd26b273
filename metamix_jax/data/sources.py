"""Data given from Python: any object with `__len__` and `__getitem__`, or a pair of arrays."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from metamix_jax.errors import UserError

NAME = "given"  # config.data.name of such data
IMAGE_KEYS, LABEL_KEYS = ("image", "img", "pixels"), ("label", "fine_label", "labels", "target")
_EXPECTED = "expected (image, label), or a dictionary with image and label"


@dataclasses.dataclass(frozen=True)
class Source:
    """A random-access source of examples, each (image, label) or a dictionary with both.

    Images are encoded bytes, Pillow images, or uint8 arrays [h, w] or [h, w, c].
    """

    examples: Any
    name: str  # for error messages

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns `image` and `label` of examples; raises UserError where that is not possible."""
        return [self._example(index) for index in indices]

    def _example(self, index: int) -> dict[str, Any]:
        where = f"{self.name}, example {index}"
        try:
            example = self.examples[index]
        except Exception as error:  # anything the source may raise
            raise UserError(f"{where}: {type(error).__name__}: {error}") from error
        if isinstance(example, Mapping):
            image, label = (_first(example, keys) for keys in (IMAGE_KEYS, LABEL_KEYS))
        elif isinstance(example, tuple | list) and len(example) == 2:
            image, label = example
        else:
            raise UserError(f"{where}: a {type(example).__name__}; {_EXPECTED}")
        if image is None or label is None:
            raise UserError(f"{where}: a dictionary of {', '.join(example)}; {_EXPECTED}")
        if not isinstance(image, bytes | Image.Image):
            image = np.asarray(image)
        if not (np.ndim(label) == 0 and np.issubdtype(np.asarray(label).dtype, np.integer)):
            raise UserError(f"{where}: label {label!r}; expected an integer")
        return {"image": image, "label": int(label)}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Arrays of images and labels as a source."""

    images: Any
    labels: Any

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


def open_source(given: Any, name: str) -> Source:
    """Returns the source of a split; raises UserError unless it has a length and examples."""
    pair = isinstance(given, tuple | list) and len(given) == 2
    if pair and len(getattr(given[0], "shape", ())) > 2:  # not two examples
        if len(given[0]) != len(given[1]):
            raise UserError(f"{name}: {len(given[0])} images and {len(given[1])} labels")
        given = Pairs(*given)
    if not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        raise UserError(
            f"{name}: a {type(given).__name__}; expected an object with __len__ and __getitem__, "
            "or (images, labels)"
        )
    if not len(given):
        raise UserError(f"{name}: no examples; expected at least 1")
    return Source(given, name)


def _first(example: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((example[key] for key in keys if key in example), None)
