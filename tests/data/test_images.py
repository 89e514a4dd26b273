import concurrent.futures
import io
import math

import cv2
import numpy as np
import pytest
from PIL import Image

from metamix_jax.data import images
from metamix_jax.data.images import RandomResizedCropFlip, Resize
from tests.helpers.tiny_images import to_bytes

TURN = {"seed": 0, "epoch": 0, "index": 0}


def photograph(width, height):
    """Returns a smooth RGB image with edges, like a photograph."""
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
    assert left.min() == 0 and top.min() == 0  # the edges are reached but not exceeded
    assert right.max() == size[0] and bottom.max() == size[1]
    area = width * height / math.prod(size)
    rounding = 1 / min(width.min(), height.min())
    assert area.min() >= 0.08 * (1 - 2 * rounding) and area.max() <= 1
    ratio = width / height
    assert ratio.min() >= 3 / 4 * (1 - 2 * rounding) and ratio.max() <= 4 / 3 * (1 + 2 * rounding)
    # Small crops always fit, so their ratios are as drawn: log-uniform.
    small = np.log(ratio[area < 0.4]) / math.log(4 / 3)
    assert len(small) > 400
    assert abs(small.mean()) < 0.1 and abs(small.std() - 1 / math.sqrt(3)) < 0.05
    np.testing.assert_allclose(np.histogram(small, 4, (-1, 1))[0] / len(small), 0.25, atol=0.07)


def test_crop_area_and_place_are_uniform():
    boxes = np.array([crop((400, 400), index) for index in range(4000)])
    left, top, right, bottom = boxes.T
    area = (right - left) * (bottom - top) / 400**2
    # Up to 3/4 of a square image, any ratio fits.
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
    no_fit = iter([0.999, 0.0, 0.5, 0.5] * 10)  # the whole area at the narrowest ratio
    assert images.random_crop(size, no_fit) == box
    if size != (1, 1):
        assert next(no_fit, None) is None


def test_crops_are_pinned():
    # A change here would change the images of runs resumed across versions.
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


def bilinear(pixels, height, width):
    """Resizes without antialiasing."""

    def weights(new, old):
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        return np.maximum(0, 1 - abs(place[:, None] - np.arange(old)))

    rows, columns = weights(height, pixels.shape[0]), weights(width, pixels.shape[1])
    return np.einsum("yh,hwc,xw->yxc", rows, pixels, columns, optimize=True)


def test_training_image_of_a_jpeg_is_its_crop_resized_bilinearly():
    encoded, transform = to_bytes(photograph(320, 260)), RandomResizedCropFlip((160, 170, 3))
    source = np.asarray(Image.open(io.BytesIO(encoded)))
    mirrored = 0
    for index in range(100):
        result = transform(encoded, seed=2, epoch=1, index=index)
        assert result.shape == (160, 170, 3) and result.dtype == np.uint8
        left, top, right, bottom = crop((320, 260), index, epoch=1, seed=2)
        expected = bilinear(source[top:bottom, left:right], 160, 170)
        if images._uniform(1, 2, 1, index)[0] < 0.5:
            mirrored += 1
            expected = expected[:, ::-1]
        np.testing.assert_allclose(result, expected, rtol=0, atol=1)  # OpenCV uses integers
    assert 30 < mirrored < 70


def test_training_images_depend_on_seed_epoch_and_index_alone():
    encoded, transform = to_bytes(photograph(300, 280)), RandomResizedCropFlip((56, 56, 3))
    turns = [{"seed": index % 2, "epoch": index % 3, "index": index} for index in range(60)]
    one_by_one = [transform(encoded, **turn) for turn in turns]
    assert len({image.tobytes() for image in one_by_one}) == len(turns)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda turn: transform(encoded, **turn), reversed(turns)))
    np.testing.assert_array_equal(at_once[::-1], one_by_one)


def test_decoding_at_reduced_size_changes_little(monkeypatch):
    size = (1001, 763)  # sides that 2, 4 and 8 do not divide
    encoded, transform = to_bytes(photograph(*size), quality=90), RandomResizedCropFlip((64, 64, 3))
    source = Image.open(io.BytesIO(encoded))
    steps = []
    imdecode = cv2.imdecode

    def note_step(*arguments):
        pixels = imdecode(*arguments)
        steps.append(round(size[0] / pixels.shape[1]))
        return pixels

    monkeypatch.setattr(cv2, "imdecode", note_step)
    differences, shifted = [], []
    for index in range(40):
        result = transform(encoded, seed=0, epoch=0, index=index)
        if images._uniform(1, 0, 0, index)[0] < 0.5:
            result = result[:, ::-1]
        step = steps[-1]
        box = [math.floor(side / step + 0.5) * step for side in crop(size, index)]
        box[2:] = min(box[2], size[0]), min(box[3], size[1])
        full = source.resize((64, 64), Image.Resampling.BILINEAR, box)
        differences.append(mean_difference(result, np.asarray(full)))
        shifted.append(mean_difference(np.roll(full, 1, axis=1), np.asarray(full)))
    assert set(steps) == {2, 4, 8}
    assert 0 < max(differences) < 1.5, differences
    # A box off by one output pixel would differ far more.
    assert min(shifted) > 5


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
    source = photograph(100, 80)
    whole, progressive = to_bytes(source), to_bytes(source, progressive=True)
    halves = [kind[: len(kind) // 2] for kind in (whole, progressive, to_bytes(source, "PNG"))]
    cuts = [whole[:2], whole[:-2], progressive[:-2], *halves]
    garbage = halves[0] + np.random.default_rng(0).bytes(len(whole) // 2)
    for damaged in (b"", b"no image", garbage, *cuts):
        with pytest.raises(images.DamagedImageError):
            transform((16, 16, 3))(damaged, **TURN)


@pytest.mark.parametrize("transform", [RandomResizedCropFlip, Resize])
def test_images_stay_as_stored_whatever_rotation_the_file_asks_for(transform):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: displayed rotated by 90 degrees
    encoded = [to_bytes(photograph(100, 60), **options) for options in ({}, {"exif": exif})]
    results = [transform((16, 16, 3))(image, **TURN) for image in encoded]
    np.testing.assert_array_equal(*results)


# Images of more than 8 bits

RAMP = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)


def sixteen_bit_files():
    """Returns name -> (encoded, pixels uint16 [64, 64] or [64, 64, 3])."""
    colours = np.stack([RAMP, RAMP.T, RAMP[::-1]], axis=-1)
    opaque = np.concatenate([colours, np.full((64, 64, 1), 65535, np.uint16)], axis=-1)
    big_endian = Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes())
    return {
        "png": (cv2.imencode(".png", RAMP)[1].tobytes(), RAMP),
        "png, colours": (cv2.imencode(".png", colours[..., ::-1])[1].tobytes(), colours),
        "png, alpha": (cv2.imencode(".png", opaque[..., [2, 1, 0, 3]])[1].tobytes(), colours),
        "tiff": (cv2.imencode(".tiff", RAMP)[1].tobytes(), RAMP),
        "tiff, colours": (cv2.imencode(".tiff", colours[..., ::-1])[1].tobytes(), colours),
        "tiff, big-endian": (to_bytes(big_endian, "TIFF"), RAMP),
        "jpeg 2000": (to_bytes(Image.fromarray(RAMP), "JPEG2000"), RAMP),
        "pgm": (to_bytes(Image.fromarray(RAMP), "PPM"), RAMP),
    }


@pytest.mark.parametrize("kind", sixteen_bit_files())
def test_16_bits_become_8_by_their_high_byte(kind):
    encoded, pixels = sixteen_bit_files()[kind]
    channels = 3 if pixels.ndim == 3 else 1
    found = Resize((64, 64, channels))(encoded)
    np.testing.assert_array_equal(found.squeeze(), pixels >> 8)
    if channels == 1:
        assert found.mean() == 127.5 and len(np.unique(found)) == 256


def test_16_bit_images_are_cropped_at_all_their_levels():
    encoded, pixels = sixteen_bit_files()["png"]
    eight_bits = to_bytes(Image.fromarray((pixels >> 8).astype(np.uint8)), "PNG")
    transform = RandomResizedCropFlip((32, 32, 1))
    for index in range(4):
        turn = TURN | {"index": index}
        np.testing.assert_array_equal(transform(encoded, **turn), transform(eight_bits, **turn))


@pytest.mark.parametrize(("mode", "kind"), [("I", "32-bit integer"), ("F", "floating-point")])
@pytest.mark.parametrize("transform", [Resize((8, 8, 1)), RandomResizedCropFlip((8, 8, 1))])
def test_pixels_without_a_defined_range_are_refused(mode, kind, transform):
    encoded = to_bytes(Image.fromarray(RAMP.astype(np.int32)).convert(mode), "TIFF")
    with pytest.raises(images.UnsupportedImageError, match=f"{kind} pixels; expected 8 or 16"):
        transform(encoded, **TURN)
