"""Packs integer levels of 2 to 8 bits into a bit stream, and unpacks them.

Bit order: level i occupies bits [i * b, (i + 1) * b) of the stream, least significant bit first,
negative levels in two's complement; bit k of the stream is bit k % 8 (counted from the least
significant) of byte k // 8. The last byte is zero-padded.
"""

import math

import numpy as np


def packed_size(count: int, bits: int) -> int:
    """Returns the size in bytes of `count` packed levels of `bits` bits."""
    return -(-count * bits // 8)


def pack(levels: np.ndarray, bits: int) -> bytes:
    """Returns the bit stream of int8 levels of any shape, in C order."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    assert levels.size == 0 or low <= levels.min() <= levels.max() <= high, f"not {bits} bits wide"
    columns = levels.astype(np.int8).reshape(-1, 1).view(np.uint8)
    ones_and_zeros = np.unpackbits(columns, axis=1, bitorder="little")[:, :bits]
    return np.packbits(ones_and_zeros.reshape(-1), bitorder="little").tobytes()


def unpack(content: bytes, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the int8 levels of `shape` that `pack` turned into `content`.

    Raises:
      ValueError: the size does not match `shape`, or the padding is not zero.
    """
    count = math.prod(shape)
    if len(content) != packed_size(count, bits):
        raise ValueError(
            f"{len(content)} bytes of packed weights; expected {packed_size(count, bits)} for "
            f"{count} levels of {bits} bits"
        )
    stream = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
    if stream[count * bits :].any():
        raise ValueError("packed weights: expected zeros after the last level")
    columns = np.zeros((count, 8), np.uint8)
    columns[:, :bits] = stream[: count * bits].reshape(count, bits)
    columns[:, bits:] = columns[:, bits - 1 : bits]  # sign extension
    return np.packbits(columns, axis=1, bitorder="little").view(np.int8).reshape(shape)
