"""Rewrites a TFDS data set from tfrecord to array_record files, once and for all.

    python -m metamix_jax.data.convert_tfrecord SOURCE TARGET

SOURCE and TARGET are version folders, such as OLD/imagenet2012/5.1.0 and NEW/imagenet2012/5.1.0;
afterwards config.data.data_dir=NEW. Records are copied as they are, their checksums verified, and
TensorFlow is not needed. TARGET appears under its name when it is complete.
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

_LANE_WORDS = 32  # of four bytes
_TO_ALL_ONES = bytes.fromhex("54641f64")  # takes a CRC from 0 to its official start


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m metamix_jax.data.convert_tfrecord", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", type=Path, help="such as OLD/imagenet2012/5.1.0")
    parser.add_argument("target", type=Path, help="such as NEW/imagenet2012/5.1.0, not there yet")
    options = parser.parse_args(arguments)
    try:
        examples = convert(options.source.expanduser(), options.target.expanduser())
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{options.target}: {examples} examples")
    return 0


def convert(source: Path, target: Path) -> int:
    """Writes `source` anew in array_record form at `target`; returns the number of examples.

    Raises:
      UserError: not a whole tfrecord data set, an existing target, or too little room.
    """
    from tqdm import tqdm

    if target.exists():
        raise UserError(f"{target}: exists; expected a new folder")
    shards = _shards(source)
    size = sum(path.stat().st_size for path, _ in shards)
    unfinished = target.with_name(f"{target.name}.incomplete")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a conversion that was killed
    try:
        unfinished.mkdir(parents=True)
        if (free := shutil.disk_usage(unfinished).free) < size:
            raise UserError(
                f"{target}: {free / 2**30:.1f} GiB free; expected {size / 2**30:.1f} for the copy"
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
    """Returns the files of all splits and how many examples each holds."""
    import tensorflow_datasets as tfds

    if not (source / "dataset_info.json").is_file():
        raise UserError(
            f"{source}: no dataset_info.json; expected a TFDS version folder, such as "
            "DATA_DIR/imagenet2012/5.1.0"
        )
    try:
        info = tfds.builder_from_directory(source).info
        shards = [
            (Path(path), examples)
            for split in info.splits.values()
            for path, examples in zip(split.filepaths, split.shard_lengths, strict=True)
        ]
    except Exception as error:  # TFDS raises many kinds for files that it cannot make sense of
        raise UserError(f"{source}: not a TFDS data set ({first_line(error)})") from error
    if info.file_format.value != "tfrecord":
        raise UserError(f"{source}: is {info.file_format.value}; expected tfrecord")
    missing = [path for path, _ in shards if not path.is_file()]
    if missing or not shards:
        raise UserError(
            f"{source}: {len(missing)} of {len(shards)} tfrecord files are missing"
            + "".join(f", such as {path.name}" for path in missing[:1])
        )
    return shards


def _convert_shard(path: Path, folder: Path, examples: int) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    # One record a group, as TFDS writes them, for reading in any order.
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
                f"{path}: holds {found} examples; expected {examples} as in dataset_info.json"
            )
    finally:
        writer.close()


def _write_info(path: Path) -> None:
    info = json.loads(path.read_text())
    info["fileFormat"] = "array_record"
    info.pop("alternativeFileFormats", None)  # files in these formats were not copied
    for split in info["splits"]:
        if "filepathTemplate" in split:
            template = split["filepathTemplate"]
            split["filepathTemplate"] = template.replace(".tfrecord", ".array_record")
    path.write_text(json.dumps(info, indent=2, sort_keys=True))


def read_tfrecord(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yields the records of a tfrecord file, their checksums verified.

    A record is its length (uint64), a checksum of that (uint32), the data, a checksum of the data.
    Raises UserError where that is not so.
    """
    while header := file.read(12):
        start = file.tell() - len(header)
        if len(header) < 12 or struct.unpack("<I", header[8:])[0] != masked_crc32c(header[:8]):
            raise UserError(f"{path}: damaged at byte {start}; copy the file again")
        (length,) = struct.unpack("<Q", header[:8])
        record, checksum = file.read(length), file.read(4)
        if len(checksum) < 4:
            raise UserError(f"{path}: cut short at byte {file.tell()}; copy the file again")
        if struct.unpack("<I", checksum)[0] != masked_crc32c(record):
            raise UserError(f"{path}: damaged record at byte {start}; copy the file again")
        yield record


def masked_crc32c(data: bytes) -> int:
    """Returns the checksum that tfrecord files hold: CRC-32C, rotated and shifted."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C (Castagnoli) of `data`, fast enough for hundreds of gigabytes.

    A CRC is linear: data is cut into lanes of 32 words, all lanes go through the table at once,
    and neighbours are then joined in pairs, the left one moved on by the length of the right.
    """
    data = np.frombuffer(_TO_ALL_ONES + data, np.uint8)
    lanes = 1 << (-(-len(data) // (4 * _LANE_WORDS)) - 1).bit_length()
    padded = np.zeros(4 * lanes * _LANE_WORDS, np.uint8)
    padded[len(padded) - len(data) :] = data  # zeros in front leave a state of zero as it is
    columns = np.ascontiguousarray(padded.view("<u4").reshape(lanes, _LANE_WORDS).T)
    state = np.zeros(lanes, np.uint32)
    for column in columns:
        state = _apply(_move_on(0), state ^ column)
    power = _LANE_WORDS.bit_length() - 1
    while len(state) > 1:
        state = _apply(_move_on(power), state[0::2]) ^ state[1::2]
        power += 1
    return int(state[0]) ^ 0xFFFFFFFF


def _apply(tables: np.ndarray, state: np.ndarray) -> np.ndarray:
    return tables[0][state & 0xFFFF] ^ tables[1][state >> 16]


@functools.cache
def _move_on(power: int) -> np.ndarray:
    """Returns the tables [2, 65536] that move a state on by 2**power words of zeros.

    For the low and the high half of the state; the two results are to be joined by exclusive or.
    """
    if power:
        half = _move_on(power - 1)
        return np.stack([_apply(half, half[0]), _apply(half, half[1])])
    low = np.arange(2**16, dtype=np.uint32)
    state = np.stack([low, low << 16])
    for _ in range(32):
        state = (state >> 1) ^ np.where(state & 1, np.uint32(0x82F63B78), np.uint32(0))
    return state


if __name__ == "__main__":
    sys.exit(main())
