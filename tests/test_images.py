import io
import math

import numpy as np
import pytest
from PIL import Image
from tiny_images import to_bytes

from metamix_jax import images
from metamix_jax.images import RandomResizedCropFlip, Resize

TURN = {"seed": 0, "epoch": 0, "index": 0}


def photograph(width, height):
    """Something smooth with edges, as photographs are; RGB."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(x / 17 + k) + np.cos(y / (11 + k)) + (x + 2 * y > 300 + 90 * k) for k in range(3)
    ]
    return Image.fromarray(np.uint8(30 + 45 * (np.stack(waves, -1) + 1.6)))


def mean_difference(one, other):
    return np.abs(one.astype(float) - other.astype(float)).mean()


# Crops


def crop(size, index=0, epoch=0, seed=0):
    return images.random_crop(size, iter(images._uniform(41, seed, epoch, index)[1:]))


@pytest.mark.parametrize("size", [(500, 375), (299, 299), (375, 500), (64, 48)])
def test_crops_are_of_the_allowed_area_and_aspect_ratio(size):
    boxes = np.array([crop(size, index) for index in range(2000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert left.min() == 0 and top.min() == 0  # the edges are reached, and not passed
    assert right.max() == size[0] and bottom.max() == size[1]
    area = width * height / math.prod(size)
    rounding = 1 / min(width.min(), height.min())
    assert area.min() >= 0.08 * (1 - 2 * rounding) and area.max() <= 1
    ratio = width / height
    assert ratio.min() >= 3 / 4 * (1 - 2 * rounding) and ratio.max() <= 4 / 3 * (1 + 2 * rounding)
    # Small crops always fit, so their ratios are as drawn: uniform in the logarithm.
    small = np.log(ratio[area < 0.4]) / math.log(4 / 3)
    assert len(small) > 400
    assert abs(small.mean()) < 0.1 and abs(small.std() - 1 / math.sqrt(3)) < 0.05
    np.testing.assert_allclose(np.histogram(small, 4, (-1, 1))[0] / len(small), 0.25, atol=0.07)


def test_crop_area_and_place_are_uniform():
    boxes = np.array([crop((400, 400), index) for index in range(4000)])
    left, top, right, bottom = boxes.T
    area = (right - left) * (bottom - top) / 400**2
    # Below 3/4 of a square image any ratio fits.
    share = np.histogram(area, 4, (0.08, 0.72))[0]
    np.testing.assert_allclose(share / share.sum(), 0.25, atol=0.03)
    for start, size in ((left, right - left), (top, bottom - top)):
        small = size < 300
        place = start[small] / (400 - size[small])
        np.testing.assert_allclose(np.histogram(place, 4, (0, 1))[0] / small.sum(), 0.25, atol=0.04)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((900, 30), (430, 0, 470, 30)),  # 4/3
        ((30, 900), (0, 430, 30, 470)),  # 3/4
        ((1, 1), (0, 0, 1, 1)),
        ((40, 33), (0, 0, 40, 33)),
    ],
)
def test_centre_crop_where_no_draw_fits(size, box):
    no_fit = iter([0.999, 0.0, 0.5, 0.5] * 10)  # the whole area, as upright as can be
    assert images.random_crop(size, no_fit) == box
    if size != (1, 1):
        assert next(no_fit, None) is None


def test_crops_are_pinned():
    # A change here would make runs resumed across versions see other images.
    assert crop((500, 375), index=7, epoch=3, seed=1) == (116, 62, 354, 265)
    numbers = images._uniform(2, seed=-1, epoch=0, index=5)
    assert numbers == [0.011441856070074308, 0.07427885186576322]


def test_crops_depend_on_seed_epoch_and_index():
    turns = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, 0, 2**31)]
    numbers = [tuple(images._uniform(41, *turn)) for turn in turns]
    assert len(set(numbers)) == len(turns)
    assert numbers == [tuple(images._uniform(41, *turn)) for turn in turns]
    assert all(0 <= number < 1 for turn in numbers for number in turn)


# Training


def test_training_image_is_the_resized_crop_mirrored_or_not():
    source = photograph(320, 260)
    encoded, transform = to_bytes(source, "PNG"), RandomResizedCropFlip((48, 64, 3))
    mirrored = 0
    for index in range(200):
        result = transform(encoded, seed=2, epoch=1, index=index)
        assert result.shape == (48, 64, 3) and result.dtype == np.uint8
        box = crop(source.size, index, epoch=1, seed=2)
        expected = np.asarray(source.resize((64, 48), Image.Resampling.BILINEAR, box=box))
        if not np.array_equal(result, expected):
            mirrored += 1
            np.testing.assert_array_equal(result, expected[:, ::-1])
    assert 75 < mirrored < 125


def test_crops_of_small_images_are_enlarged():
    result = RandomResizedCropFlip((32, 32, 3))(to_bytes(photograph(9, 5)), **TURN)
    assert result.shape == (32, 32, 3)


def test_decoding_at_reduced_size_changes_little(monkeypatch):
    source = photograph(1001, 763)  # sides that 2, 4 and 8 do not divide
    encoded, transform = to_bytes(source, quality=90), RandomResizedCropFlip((64, 64, 3))
    turns = [{"seed": 0, "epoch": 0, "index": index} for index in range(40)]
    scales = []
    draft = Image.Image.draft

    def note_scale(image, mode, size):
        result = jpeg_draft(image, mode, size)
        scales.append(round(1001 / image.width))
        return result

    from PIL import JpegImagePlugin

    jpeg_draft = JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", note_scale)
    reduced = [transform(encoded, **turn) for turn in turns]
    assert set(scales) == {2, 4, 8}
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", draft)  # does nothing
    full = [transform(encoded, **turn) for turn in turns]
    differences = [mean_difference(*pair) for pair in zip(reduced, full, strict=True)]
    assert 0 < max(differences) < 1.5, differences
    # A box that was off by one pixel of the result would show far more.
    shifted = [np.roll(image, 1, axis=1) for image in full]
    assert min(mean_difference(*pair) for pair in zip(shifted, full, strict=True)) > 2


# Evaluation


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (299, 299), (256, 301), (120, 90)])
def test_evaluation_resizes_the_shorter_side_and_crops_the_centre(size):
    source = photograph(*size)
    encoded = to_bytes(source)
    result = Resize((224, 224, 3), shorter_side=256)(encoded)
    # torchvision.transforms' Resize(256) and CenterCrop(224), written out.
    width, height = size
    if width <= height:
        resized = (256, int(256 * height / width))
    else:
        resized = (int(256 * width / height), 256)
    image = Image.open(io.BytesIO(encoded)).resize(resized, Image.Resampling.BILINEAR)
    top, left = round((resized[1] - 224) / 2.0), round((resized[0] - 224) / 2.0)
    expected = np.asarray(image)[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(result, expected)


def test_evaluation_without_crop_resizes_to_the_square():
    source = photograph(50, 40)
    result = Resize((24, 24, 3))(to_bytes(source, "PNG"))
    expected = source.resize((24, 24), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(result, np.asarray(expected))
    unchanged = Resize((40, 50, 3))(to_bytes(source, "PNG"))
    np.testing.assert_array_equal(unchanged, np.asarray(source))


# Kinds of files


@pytest.mark.parametrize("transform", [RandomResizedCropFlip, Resize])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
def test_all_kinds_of_jpeg_become_rgb(mode, transform):
    source = photograph(160, 140)
    if mode == "L":
        source = source.convert("L")
    encoded = to_bytes(source.convert(mode), quality=95)
    result = transform((16, 16, 3))(encoded, **TURN)
    expected = transform((16, 16, 3))(to_bytes(source.convert("RGB"), "PNG"), **TURN)
    assert result.shape == (16, 16, 3)
    assert mean_difference(result, expected) < 4


@pytest.mark.parametrize("transform", [RandomResizedCropFlip, Resize])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_networks_get_one_channel(kind, transform):
    result = transform((16, 16, 1))(to_bytes(photograph(80, 80), kind), **TURN)
    grey = transform((16, 16, 1))(to_bytes(photograph(80, 80).convert("L"), "PNG"), **TURN)
    assert result.shape == (16, 16, 1)
    assert mean_difference(result, grey) < 3


@pytest.mark.parametrize("transform", [RandomResizedCropFlip, Resize])
def test_damaged_images(transform):
    whole = to_bytes(photograph(100, 80))
    png = to_bytes(photograph(100, 80), "PNG")
    for damaged in (b"", b"no image", whole[:2], whole[: len(whole) // 2], png[: len(png) // 2]):
        with pytest.raises(images.DamagedImageError):
            transform((16, 16, 3))(damaged, **TURN)
