"""Random user input: one error line or success; no traceback, no hang.

A few dozen examples each in `make test`, many more in `make check-faults`.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from metamix_jax import command_line
from metamix_jax.config import default, validate_start
from metamix_jax.data import images
from metamix_jax.errors import UserError
from metamix_jax.networks import torch_weights
from metamix_jax.selection import policy
from metamix_jax.selection.cost import widest_bits
from metamix_jax.training import setup
from metamix_jax.workdir import claim, files
from tests.helpers.processes import ROOT
from tests.helpers.tiny_images import to_bytes
from tests.helpers.tiny_network import make_config

FEW = 40
QUIET = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
counts = pytest.mark.parametrize(
    "count",
    [pytest.param(FEW, id="few"), pytest.param(100 * FEW, id="many", marks=pytest.mark.faults)],
)


def fuzz(count, check, *strategies):
    """Calls `check` with `count` examples, always the same."""
    settings(max_examples=count, derandomize=True, **QUIET)(given(*strategies)(check))()


# Texts for any field, and likely mistakes in numbers, tuples and names.
TEXTS = (
    "", "0", "-1", "1", "3", "64", "1.5", "nan", "inf", "-inf", "1e308", "1e400", "1" + 30 * "0",
    "1" + 400 * "0", "None", "True", "()", "(1,)", "('a',)", "(nan,)", "(0.0,)", "(None,)",
    "((1,),)", "(8,4)", "(8.0,4.0)", "(-1,)", "[]", "{}", "x", "(", ")", "'", "\x00", "é",
    "__import__('os').getcwd()",
)  # fmt: skip


def leaf_paths(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaf_paths(value, f"{prefix}{key}.")
        else:
            yield prefix + key


FIELDS = sorted({*leaf_paths(default().to_dict()), *(f"model.{k}" for k in ("depth", "width"))})


def run_command_line(arguments):
    """Parses like main.py and builds all that needs no data; SystemExit or UserError if invalid."""
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    command_line.parse_flags(arguments)
    config = flags.FLAGS.config
    network = setup.make_network(config)
    validate_start(config)
    setup.make_schedule(config, 1437)
    return network


@counts
def test_command_lines(count):
    """Sets any field to any text."""
    start = ["main.py", f"--config={ROOT}/configs/digits.py", "--workdir=nowhere"]

    def check(changes):
        arguments = [*start, *(f"--config.{path}={text}" for path, text in changes)]
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                run_command_line(arguments)
        except SystemExit as end:
            lines = stderr.getvalue().splitlines()
            assert end.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        except UserError as error:
            assert "\n" not in str(error)

    change = st.tuples(st.sampled_from(FIELDS), st.sampled_from(TEXTS))
    fuzz(count, check, st.lists(change, min_size=1, max_size=2))


# Files ---------------------------------------------------------------------------------------


@st.composite
def damaged(draw, contents):
    """Bytes with one to four faults: bits flipped; parts removed, repeated, inserted, appended."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        # Half of the faults near the start, where headers are.
        end = draw(st.sampled_from([min(400, len(content)), len(content)]))
        place = draw(st.integers(0, end - 1))
        length = draw(st.integers(1, 20))
        match draw(st.integers(0, 4)):
            case 0:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del content[place:]
            case 2:
                del content[place : place + length]
            case 3:
                content[place : place + length] = draw(st.binary(max_size=20))
            case 4:
                content[place:place] = content[place : place + 10 * length]
    return bytes(content)


def refused(function, *arguments):
    """Returns a function's result, or the message of its UserError, which is one line."""
    try:
        return function(*arguments)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["format", "layers", "act_bits", "conv1"]), inner)
    ),
    max_leaves=5,
)


@counts
def test_policy_files(count, tmp_path):
    """Puts any JSON in any place of a policy, and damages its text."""
    network = setup.make_network(make_config())
    facts = dict.fromkeys(("model", "image_size", "searcher", "seed", "budget_gbops"), 1)
    good = policy.make_policy(network.costs, widest_bits(network.costs), **facts).to_json()
    path = tmp_path / "policy.json"

    def check_text(text):
        path.write_bytes(text)
        found = refused(policy.read_policy, path, network.costs)
        if not isinstance(found, str):
            found.branches(network.costs)

    def check_value(place, value):
        changed = json.loads(json.dumps(good))
        *way, last = place
        functools.reduce(dict.__getitem__, way, changed)[last] = value
        check_text(json.dumps(changed).encode())

    layers = list(good["layers"])
    places = [(key,) for key in good]
    places += [("layers", layer) for layer in layers]
    places += [("layers", layers[1], key) for key in ("act_bits", "weight_bits", "macs")]
    fuzz(count, check_text, damaged([json.dumps(good).encode()]))
    fuzz(count, check_value, st.sampled_from(places), JSON)
    check_text(b"[" * 100_000)
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refused(policy.read_policy, tmp_path / "pipe", network.costs)


WEIGHTS = {
    "conv1.weight": np.arange(24, dtype=np.float32).reshape(4, 3, 2, 1),
    "bn1.bias": np.ones(4, np.float32),
}


def weight_files(kind):
    """Returns the bytes of valid weight files of one type."""
    if kind == "safetensors":
        return [safetensors.numpy.save(WEIGHTS)]
    buffers = [io.BytesIO(), io.BytesIO()]
    if kind == "npz":
        np.savez(buffers[0], **WEIGHTS)
        np.savez_compressed(buffers[1], **WEIGHTS)
    else:
        torch = pytest.importorskip("torch")
        tensors = {name: torch.tensor(value) for name, value in WEIGHTS.items()}
        torch.save(tensors, buffers[0])
        torch.save(tensors, buffers[1], _use_new_zipfile_serialization=False)
    return [buffer.getvalue() for buffer in buffers]


@counts
@pytest.mark.parametrize(
    "kind", ["npz", "safetensors", pytest.param("pth", marks=pytest.mark.torch)]
)
def test_weight_files(count, kind, tmp_path):
    path = tmp_path / f"weights.{kind}"

    def check(content):
        path.write_bytes(content)
        found = refused(torch_weights.read_weights, path)
        if not isinstance(found, str):
            assert all(value.dtype == np.float32 for value in found.values())

    fuzz(count, check, damaged(weight_files(kind)))


def header_of_npy(shape):
    """Returns a .npy file whose header announces an array of zeros that is missing."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def memory():
    """Peak memory of this process in MiB."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1]) / 1024


def test_small_files_that_unfold_to_large_ones(tmp_path, monkeypatch):
    before, path = memory(), tmp_path / "weights.npz"
    monkeypatch.setattr(torch_weights, "MOST_BYTES", 2**24)
    np.savez_compressed(path, **{"conv1.weight": np.zeros((5, 2**20), np.float32)})
    assert path.stat().st_size < 2**16
    assert "20 MiB of weights, expected at most 16" in refused(torch_weights.read_weights, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("conv1.weight.npy", header_of_npy((10**9, 10**9)))
    assert "cannot be read, damaged?" in refused(torch_weights.read_weights, path)
    path = tmp_path / "policy.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "expected at most" in refused(policy.load_policy, path)
    assert "MiB of weights" in refused(torch_weights.read_weights, path.rename(tmp_path / "a.npz"))
    # An image of one column; a shorter side of 256 would make it 16 million pixels high.
    column = to_bytes(Image.new("RGB", (1, 65500)))
    with pytest.raises(images.DamagedImageError):
        images.Resize((224, 224, 3), 256)(column)
    assert memory() - before < 100


@pytest.mark.torch
def test_one_number_that_stands_for_many(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(1).expand(10**6, 10**6)}, path)
    assert "MiB of weights, expected at most" in refused(torch_weights.read_weights, path)


def pictures():
    y, x = np.mgrid[0:48, 0:64]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 5)], -1)
    picture = Image.fromarray(np.uint8(128 + 50 * waves))
    return [
        to_bytes(picture), to_bytes(picture, progressive=True), to_bytes(picture, "PNG"),
        to_bytes(picture, "WEBP"), to_bytes(picture, "GIF"),
    ]  # fmt: skip


TRANSFORMS = (
    images.Resize((32, 32, 3)),
    images.Resize((32, 32, 1), 40),
    images.RandomResizedCropFlip((32, 32, 3)),
)


@counts
def test_pictures(count):
    def check(content, transform):
        try:
            pixels = transform(content, seed=0, epoch=0, index=0)
        except images.DamagedImageError:
            return
        assert pixels.shape == transform.shape and pixels.dtype == np.uint8

    fuzz(5 * count, check, damaged(pictures()), st.sampled_from(TRANSFORMS))


@pytest.mark.parametrize("size", [(1, 1), (30, 64), (48, 10), (2000, 2000), (65535, 65535)])
def test_pictures_with_two_sizes(size):
    """A JPEG with a second header of another size: Pillow may use one, OpenCV the other."""
    content = to_bytes(Image.new("RGB", (64, 48)))
    start = content.index(b"\xff\xc0")
    header = bytearray(content[start : start + 19])
    header[5:9] = struct.pack(">HH", size[1], size[0])
    for place in (start, start + 19):
        both = content[:place] + bytes(header) + content[place:]
        for transform in TRANSFORMS:
            with contextlib.suppress(images.DamagedImageError):
                assert transform(both, seed=0, epoch=0, index=3).shape == transform.shape


@counts
def test_files_of_a_workdir(count, tmp_path):
    """config.json and other files, as damaged by another program or a bad disk."""
    good = json.dumps({"seed": 0, "model": {"name": "cifar_resnet"}}).encode()
    path = tmp_path / "config.json"

    def check(content):
        path.write_bytes(content)
        with contextlib.suppress(OSError, ValueError):
            files.read_json(path)

    fuzz(count, check, damaged([good]))
    config = make_config()
    for content in (b"[1]", b"1", b'"text"', b"null", b"[" * 100_000, b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read .*remove it if you are sure"):
            claim.check_same_run(config, tmp_path, {}, ())
