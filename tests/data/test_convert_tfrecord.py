import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.record_writer import RecordWriter

from metamix_jax.data import convert_tfrecord, datasets
from metamix_jax.errors import UserError
from tests.helpers import tiny_images
from tests.helpers.tiny_images import tiny_config

ROOT = pathlib.Path(__file__).parents[2]


def reference_crc32c(data):
    """CRC-32C bit by bit, per its definition."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def write_tfrecord(path, records):
    # An independent writer: TensorBoard's event files are tfrecord files.
    writer = RecordWriter(str(path))
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture(scope="module")
def array_record(tmp_path_factory):
    return tiny_images.write(tmp_path_factory.mktemp("array_record"))


@pytest.fixture
def source(array_record, tmp_path):
    """The version directory of a tfrecord copy, with the training split in three files."""
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(array_record / "tiny_images/1.0.0")
    folder = tmp_path / "old/tiny_images/1.0.0"
    folder.mkdir(parents=True)
    shutil.copyfile(info.data_path / "features.json", folder / "features.json")
    content = json.loads((info.data_path / "dataset_info.json").read_text())
    content["fileFormat"] = "tfrecord"
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for split in content["splits"]:
        name = split["name"]
        records = info.as_data_source(name, deserialize_method=raw)
        records = records.__getitems__(list(range(len(records))))
        lengths = [20, 1, 16] if name == "train" else [11]
        split["shardLengths"] = [str(length) for length in lengths]
        starts = np.cumsum([0, *lengths])
        for i, (start, length) in enumerate(zip(starts, lengths, strict=False)):
            path = folder / f"tiny_images-{name}.tfrecord-{i:05}-of-{len(lengths):05}"
            write_tfrecord(path, records[start : start + length])
    (folder / "dataset_info.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new/tiny_images/1.0.0"


def test_converted_copy_is_read_as_the_original(array_record, source, target, capsys):
    with pytest.raises(UserError, match="expected array_record, convert it"):
        datasets.load(tiny_config(source.parents[1]))
    assert convert_tfrecord.main([str(source), str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: 48 examples\n"
    converted = datasets.load(tiny_config(target.parents[1]))
    original = datasets.load(tiny_config(array_record))
    for name in ("train", "evaluation"):
        one, other = getattr(converted, name), getattr(original, name)
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert sorted(path.name for path in target.iterdir()) == [
        "dataset_info.json",
        "features.json",
        "tiny_images-test.array_record-00000-of-00001",
        *(f"tiny_images-train.array_record-{i:05}-of-00003" for i in range(3)),
    ]
    assert not list(target.parent.glob("*incomplete*"))
    # A slice across file boundaries.
    middle = datasets.load(tiny_config(target.parents[1], train_split="train[19:23]")).train
    np.testing.assert_array_equal(middle.images, original.train.images[19:23])


def first_shard(source):
    return source / "tiny_images-train.tfrecord-00000-of-00003"


def cut(source):
    path = first_shard(source)
    path.write_bytes(path.read_bytes()[:-7])


def cut_in_header(source):
    path = first_shard(source)
    path.write_bytes(path.read_bytes() + b"\1\0\0")


def swap(source):
    other = first_shard(source).name.replace("00000-", "00001-")
    shutil.copyfile(source / other, first_shard(source))


def flip(source, place):
    content = bytearray(first_shard(source).read_bytes())
    content[place] ^= 1
    first_shard(source).write_bytes(content)


DAMAGES = {
    "cut": (cut, r"00000-of-00003: truncated at byte \d+; copy the file again"),
    "cut_in_header": (cut_in_header, r"00000-of-00003: damaged at byte \d+; copy"),
    "length": (lambda source: flip(source, 0), "00000-of-00003: damaged at byte 0; copy"),
    "data": (lambda source: flip(source, 300), "00000-of-00003: damaged record at byte 0; copy"),
    "checksum": (lambda source: flip(source, -1), r"00000-of-00003: damaged record at byte \d{4}"),
    "records": (swap, r"00000-of-00003: contains 1 examples; expected 20"),
    "missing": (
        lambda source: first_shard(source).unlink(),
        r"1 of 4 .* missing, e\.g\. .*00000-",
    ),
    "no_info": (
        lambda source: (source / "dataset_info.json").unlink(),
        r"1\.0\.0: no dataset_info\.json; expected a TFDS version directory",
    ),
    "spoilt_info": (
        lambda source: (source / "dataset_info.json").write_text("{"),
        r"1\.0\.0: not a TFDS data set",
    ),
    "no_features": (
        lambda source: (source / "features.json").unlink(),
        r"1\.0\.0: not a TFDS data set",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_copies_leave_nothing_behind(source, target, damage, capsys):
    spoil, message = DAMAGES[damage]
    spoil(source)
    with pytest.raises(UserError, match=message):
        convert_tfrecord.convert(source, target)
    assert not target.exists()
    assert not target.parent.exists() or not list(target.parent.iterdir())
    assert convert_tfrecord.main([str(source), str(target)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_unusable_targets(source, target):
    with pytest.raises(UserError, match=r"1\.0\.0: already exists; expected a new directory"):
        convert_tfrecord.convert(source, source)
    target.parents[1].mkdir()
    target.parent.write_text("a file")
    with pytest.raises(UserError, match=r"1\.0\.0: cannot be written"):
        convert_tfrecord.convert(source, target)


def test_too_little_disk_space_is_an_error(source, target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(UserError, match=r"0\.0 GiB free; expected 0\.0"):
        convert_tfrecord.convert(source, target)
    assert not target.exists()


def test_array_record_needs_no_conversion(array_record, target):
    with pytest.raises(UserError, match=r"format array_record; expected tfrecord"):
        convert_tfrecord.convert(array_record / "tiny_images/1.0.0", target)


def test_what_a_killed_conversion_left_is_replaced(source, target):
    leftover = target.with_name("1.0.0.incomplete")
    leftover.mkdir(parents=True)
    (leftover / "rubbish").write_text("x")
    assert convert_tfrecord.convert(source, target) == 48
    assert not leftover.exists() and not (target / "rubbish").exists()


def test_command_line_needs_no_tensorflow(source, target):
    command = [sys.executable, "-m", "metamix_jax.data.convert_tfrecord", str(source), str(target)]
    blocked = source.parents[2] / "blocked"
    blocked.mkdir()
    (blocked / "tensorflow.py").write_text("raise ImportError('blocked')")
    environment = {**os.environ, "PYTHONPATH": str(blocked)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{target}: 48 examples\n"


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 8, 123, 124, 125, 128, 129, 4095, 4096, 9000])
def test_crc32c_equals_its_definition(size):
    data = np.random.default_rng(size).bytes(size)
    assert convert_tfrecord.crc32c(data) == reference_crc32c(data)


def test_crc32c_of_published_vectors():
    # RFC 3720, appendix B.4.
    assert convert_tfrecord.crc32c(bytes(32)) == 0x8A9136AA
    assert convert_tfrecord.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert convert_tfrecord.crc32c(bytes(range(32))) == 0x46DD794E
    assert convert_tfrecord.crc32c(b"123456789") == 0xE3069283
