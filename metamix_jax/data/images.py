"""Decoding, cropping and resizing of encoded images.

Uses Pillow, and OpenCV for training JPEGs, where it takes half the time. Both release the GIL while
decoding and resizing, so threads use all cores.
"""

import dataclasses
import io
import math
import re
from collections.abc import Iterator
from typing import Protocol

import cv2
import numpy as np
from PIL import Image

Shape = tuple[int, int, int]  # height, width, channels: 1 (grey) or 3 (RGB)
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

AREA_RANGE = (0.08, 1.0)  # fraction of the image
RATIO_RANGE = (3 / 4, 4 / 3)  # width / height
CROP_TRIES = 10

REDUCED = {  # downscaling factor of the sides -> OpenCV flag
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
# The next JPEG marker in the scan data other than a restart marker.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
SCAN, END = b"\xff\xda", b"\xff\xd9"
# Formats whose "I" images have 16 bits; elsewhere, the mode is that of 32-bit integers.
SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")


class DamagedImageError(Exception):
    """Bytes that are not an image, or not a complete one."""


class UnsupportedImageError(Exception):
    """An intact image whose pixels have no defined range; the message says what it is."""


Source = bytes | np.ndarray | Image.Image  # an encoded image, pixels uint8 [h, w] or [h, w, c]


class Transform(Protocol):
    """Turns an image into an example's pixels."""

    shape: Shape

    def __call__(self, source: Source, *, seed: int, epoch: int, index: int) -> np.ndarray:
        """Returns uint8 pixels of `shape`; randomness depends only on seed, epoch and index.

        Raises DamagedImageError or UnsupportedImageError.
        """


@dataclasses.dataclass(frozen=True)
class Resize:
    """Deterministic resize to `shape`.

    shorter_side = 0: directly, ignoring the aspect ratio. Otherwise resizes the shorter side to
    that length, keeping the aspect ratio, and takes the centre crop: ImageNet's evaluation.
    """

    shape: Shape
    shorter_side: int = 0

    def __call__(
        self, source: Source, *, seed: int = 0, epoch: int = 0, index: int = 0
    ) -> np.ndarray:
        """See `Transform`."""
        height, width, channels = self.shape
        with _open(source) as image:
            image = _load(image, channels)
        if not self.shorter_side:
            image = _resize(image, (width, height))
        else:
            # As torchvision: sizes are rounded down, the crop's corner to the nearest pixel.
            size = tuple(self.shorter_side * side // min(image.size) for side in image.size)
            if math.prod(size) > Image.MAX_IMAGE_PIXELS:
                raise DamagedImageError(f"{image.size} pixels: too narrow to resize")
            image = _resize(image, size)
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class RandomResizedCropFlip:
    """ImageNet's training transform: a random resized crop, flipped with probability 1/2."""

    shape: Shape

    def __call__(self, source: Source, *, seed: int, epoch: int, index: int) -> np.ndarray:
        """See `Transform`."""
        height, width, channels = self.shape
        mirror, *numbers = _uniform(1 + 4 * CROP_TRIES, seed, epoch, index)
        with _open(source) as image:
            box = random_crop(image.size, iter(numbers))
            pixels = None
            # Grey and CMYK JPEGs are rare, and the libraries convert their colours differently.
            encoded = isinstance(source, bytes)
            if encoded and image.format == "JPEG" and image.mode == "RGB" and channels == 3:
                pixels = _crop_jpeg(source, box, (width, height))
            if pixels is None:
                image = _load(image, channels)
                pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box))
        if mirror < 0.5:  # not [:, ::-1]: copying a reversed view is far slower
            pixels = cv2.flip(pixels, 1)
        return pixels.reshape(self.shape)


def random_crop(size: tuple[int, int], numbers: Iterator[float]) -> Box:
    """Returns a random crop within AREA_RANGE and RATIO_RANGE of an image (width, height).

    Each of up to CROP_TRIES draws takes four `numbers` from [0, 1). If none fits, returns the
    largest centre crop of an allowed aspect ratio.
    """
    width, height = size
    for _ in range(CROP_TRIES):
        area = width * height * (AREA_RANGE[0] + (AREA_RANGE[1] - AREA_RANGE[0]) * next(numbers))
        low, high = map(math.log, RATIO_RANGE)
        ratio = math.exp(low + (high - low) * next(numbers))
        place = (next(numbers), next(numbers))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(place[0] * (width - box_width + 1))
            top = int(place[1] * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width = min(width, round(height * RATIO_RANGE[1]))
    box_height = min(height, round(width / RATIO_RANGE[0]))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def _crop_jpeg(encoded: bytes, box: Box, size: tuple[int, int]) -> np.ndarray | None:
    """Returns the crop `box` of a colour JPEG resized to `size` (width, height), RGB.

    None if OpenCV cannot decode it; Pillow can, or reports what is wrong.
    """
    # OpenCV silently returns grey pixels where garbage interrupts the scan data.
    marker = MARKER.search(encoded, encoded.rfind(SCAN) + len(SCAN))
    if marker is None or marker[0] != END:
        return None
    # JPEGs decode at 1/2, 1/4 or 1/8 scale in a fraction of the time: use the smallest scale at
    # which the crop is no smaller than the output. The remaining downscaling, mostly by less than
    # two, is not antialiased.
    fits = min((box[2] - box[0]) // size[0], (box[3] - box[1]) // size[1])
    step = max(step for step in REDUCED if step <= max(fits, 1))
    # The box is in stored pixels, before any EXIF rotation.
    flags = REDUCED[step] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:
        return None
    # With a damaged header, OpenCV and Pillow may disagree about the size.
    if pixels is None or pixels.shape[0] * step < box[3] or pixels.shape[1] * step < box[2]:
        return None
    left, top, right, bottom = ((side + step // 2) // step for side in box)  # to the nearest pixel
    crop = cv2.resize(pixels[top:bottom, left:right], size, interpolation=cv2.INTER_LINEAR)
    return cv2.cvtColor(crop, cv2.COLOR_BGR2RGB)


def _uniform(count: int, seed: int, epoch: int, index: int) -> list[float]:
    """Returns `count` numbers in [0, 1) determined by seed, epoch and example index."""
    # NumPy guarantees Philox's raw stream. The epoch's permutation uses the same key with the
    # counter at 0 (batching.py), so the upper counter words separate the two streams.
    key = np.array([seed % 2**64, epoch], np.uint64)
    counter = np.array([0, 0, index, 1], np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(count)
    return ((raw >> np.uint64(11)) * 2.0**-53).tolist()


def _open(source: Source) -> Image.Image:
    """Opens an image; of an encoded one, reads only the header."""
    if isinstance(source, Image.Image):
        return source.copy()  # because the copy is closed
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8:
            raise UnsupportedImageError(f"pixels of type {source.dtype}; expected uint8, 0 to 255")
        grey = source.ndim == 3 and source.shape[-1] == 1
        if source.ndim != 2 and not (source.ndim == 3 and source.shape[-1] in (1, 3, 4)):
            raise UnsupportedImageError(
                f"an array of shape {source.shape}; expected [height, width, channels]"
            )
        return Image.fromarray(source[..., 0] if grey else source)
    try:
        return Image.open(io.BytesIO(source))
    except Exception as error:  # Pillow raises many types for damaged files
        raise DamagedImageError from error


def _load(image: Image.Image, channels: int) -> Image.Image:
    """Returns the decoded image with 8 bits per channel, grey or RGB."""
    mode = "L" if channels == 1 else "RGB"
    try:
        image.load()
    except Exception as error:
        raise DamagedImageError from error
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BITS):
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise UnsupportedImageError(f"{kind} pixels; expected 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # Pillow's conversion would clip at 255, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    try:
        return image if image.mode == mode else image.convert(mode)
    except Exception as error:
        raise DamagedImageError from error


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    # Antialiased: when downscaling, Pillow widens its bilinear filter by the scale.
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
