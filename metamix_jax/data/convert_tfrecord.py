"""Converts a TFDS data set from tfrecord to array_record files.

    python -m metamix_jax.data.convert_tfrecord SOURCE TARGET

SOURCE and TARGET are version directories, e.g. OLD/imagenet2012/5.1.0 and NEW/imagenet2012/5.1.0;
then train with config.data.data_dir=NEW. Checksums are verified and records copied unchanged;
TensorFlow is not needed. TARGET appears only once it is complete.
"""

import argparse
import functools
import json
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from metamix_jax.data.splits import first_line
from metamix_jax.errors import UserError

_LANE_WORDS = 32  # words of four bytes
_TO_ALL_ONES = bytes.fromhex("54641f64")  # moves the CRC state from 0 to its initial all-ones value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m metamix_jax.data.convert_tfrecord", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", type=Path, help="e.g. OLD/imagenet2012/5.1.0")
    parser.add_argument("target", type=Path, help="e.g. NEW/imagenet2012/5.1.0; must not exist")
    options = parser.parse_args(arguments)
    try:
        examples = convert(options.source.expanduser(), options.target.expanduser())
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{options.target}: {examples} examples")
    return 0


def convert(source: Path, target: Path) -> int:
    """Writes `source` as array_record files to `target`; returns the number of examples.

    Raises:
      UserError: `source` is not a complete tfrecord data set, `target` exists, or the disk has too
        little free space.
    """
    from tqdm import tqdm

    if target.exists():
        raise UserError(f"{target}: already exists; expected a new directory")
    shards = _shards(source)
    size = sum(path.stat().st_size for path, _ in shards)
    unfinished = target.with_name(f"{target.name}.incomplete")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed conversion
    try:
        unfinished.mkdir(parents=True)
        if (free := shutil.disk_usage(unfinished).free) < size:
            raise UserError(
                f"{target}: {free / 2**30:.1f} GiB free; expected {size / 2**30:.1f} GiB for the "
                "copy"
            )
        for path in source.iterdir():
            if path.is_file() and ".tfrecord" not in path.name:  # features, label names
                shutil.copyfile(path, unfinished / path.name)
        with tqdm(total=size, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
            for path, examples in shards:
                bar.set_description(path.name)
                _convert_shard(path, unfinished, examples)
                bar.update(path.stat().st_size)
        _write_info(unfinished / "dataset_info.json")
        unfinished.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({first_line(error)})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return sum(examples for _, examples in shards)


def _shards(source: Path) -> list[tuple[Path, int]]:
    """Returns the files of all splits, each with its number of examples."""
    import tensorflow_datasets as tfds

    if not (source / "dataset_info.json").is_file():
        raise UserError(
            f"{source}: no dataset_info.json; expected a TFDS version directory, e.g. "
            "DATA_DIR/imagenet2012/5.1.0"
        )
    try:
        info = tfds.builder_from_directory(source).info
        shards = [
            (Path(path), examples)
            for split in info.splits.values()
            for path, examples in zip(split.filepaths, split.shard_lengths, strict=True)
        ]
    except Exception as error:  # TFDS raises many types for invalid files
        raise UserError(f"{source}: not a TFDS data set ({first_line(error)})") from error
    if info.file_format.value != "tfrecord":
        raise UserError(f"{source}: format {info.file_format.value}; expected tfrecord")
    missing = [path for path, _ in shards if not path.is_file()]
    if missing or not shards:
        raise UserError(
            f"{source}: {len(missing)} of {len(shards)} tfrecord files are missing"
            + "".join(f", e.g. {path.name}; copy the data set again" for path in missing[:1])
        )
    return shards


def _convert_shard(path: Path, folder: Path, examples: int) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record per group, like TFDS, for random access.
    name = path.name.replace(".tfrecord", ".array_record")
    writer = ArrayRecordWriter(str(folder / name), "group_size:1")
    found = 0
    try:
        with path.open("rb") as file:
            for record in read_tfrecord(file, path):
                writer.write(record)
                found += 1
        if found != examples:
            raise UserError(
                f"{path}: contains {found} examples; expected {examples}, as in dataset_info.json; "
                "copy the file again"
            )
    finally:
        writer.close()


def _write_info(path: Path) -> None:
    info = json.loads(path.read_text(encoding="utf-8"))
    info["fileFormat"] = "array_record"
    info.pop("alternativeFileFormats", None)  # files in those formats were not copied
    for split in info["splits"]:
        if "filepathTemplate" in split:
            template = split["filepathTemplate"]
            split["filepathTemplate"] = template.replace(".tfrecord", ".array_record")
    path.write_text(json.dumps(info, indent=2, sort_keys=True), encoding="utf-8")


def read_tfrecord(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yields the records of a tfrecord file after verifying their checksums.

    A record is its length (uint64), the length's checksum (uint32), the data and the data's
    checksum. Raises UserError for damaged or truncated files.
    """
    while header := file.read(12):
        start = file.tell() - len(header)
        if len(header) < 12 or struct.unpack("<I", header[8:])[0] != masked_crc32c(header[:8]):
            raise UserError(f"{path}: damaged at byte {start}; copy the file again")
        (length,) = struct.unpack("<Q", header[:8])
        record, checksum = file.read(length), file.read(4)
        if len(checksum) < 4:
            raise UserError(f"{path}: truncated at byte {file.tell()}; copy the file again")
        if struct.unpack("<I", checksum)[0] != masked_crc32c(record):
            raise UserError(f"{path}: damaged record at byte {start}; copy the file again")
        yield record


def masked_crc32c(data: bytes) -> int:
    """Returns tfrecord's masked checksum: the CRC-32C, rotated, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C (Castagnoli) of `data`, fast enough for hundreds of gigabytes.

    A CRC is linear, so the data is split into lanes of 32 words that go through the table in
    parallel; neighbouring lanes are then combined pairwise, the left state advanced by the length
    of the right.
    """
    data = np.frombuffer(_TO_ALL_ONES + data, np.uint8)
    lanes = 1 << (-(-len(data) // (4 * _LANE_WORDS)) - 1).bit_length()
    padded = np.zeros(4 * lanes * _LANE_WORDS, np.uint8)
    padded[len(padded) - len(data) :] = data  # leading zeros leave a zero state unchanged
    columns = np.ascontiguousarray(padded.view("<u4").reshape(lanes, _LANE_WORDS).T)
    state = np.zeros(lanes, np.uint32)
    for column in columns:
        state = _apply(_advance(0), state ^ column)
    power = _LANE_WORDS.bit_length() - 1
    while len(state) > 1:
        state = _apply(_advance(power), state[0::2]) ^ state[1::2]
        power += 1
    return int(state[0]) ^ 0xFFFFFFFF


def _apply(tables: np.ndarray, state: np.ndarray) -> np.ndarray:
    return tables[0][state & 0xFFFF] ^ tables[1][state >> 16]


@functools.cache
def _advance(power: int) -> np.ndarray:
    """Returns the tables [2, 65536] that advance a state by 2**power zero words.

    They are indexed by the low and the high half of the state; XOR the two results.
    """
    if power:
        half = _advance(power - 1)
        return np.stack([_apply(half, half[0]), _apply(half, half[1])])
    low = np.arange(2**16, dtype=np.uint32)
    state = np.stack([low, low << 16])
    for _ in range(32):
        state = (state >> 1) ^ np.where(state & 1, np.uint32(0x82F63B78), np.uint32(0))
    return state


if __name__ == "__main__":
    sys.exit(main())
