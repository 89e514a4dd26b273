"""Integer levels of 2 to 8 bits as a stream of bits, and back.

Bit order: level i takes bits [i * b, (i + 1) * b) of the stream, its least significant bit first,
negative levels in two's complement; bit k of the stream is bit k % 8 (counted from the least
significant) of byte k // 8. The last byte is filled up with zeros.
"""

import math

import numpy as np


def packed_size(count: int, bits: int) -> int:
    """Returns the bytes that `count` levels of `bits` bits take."""
    return -(-count * bits // 8)


def pack(levels: np.ndarray, bits: int) -> bytes:
    """Returns int8 levels of any shape (in C order) as a stream of bits."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    assert levels.size == 0 or low <= levels.min() <= levels.max() <= high, f"not {bits} bits wide"
    columns = levels.astype(np.int8).reshape(-1, 1).view(np.uint8)
    ones_and_zeros = np.unpackbits(columns, axis=1, bitorder="little")[:, :bits]
    return np.packbits(ones_and_zeros.reshape(-1), bitorder="little").tobytes()


def unpack(content: bytes, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the int8 levels of `shape` that `pack` made `content` of.

    Raises:
      ValueError: another number of bytes than `shape` takes, or a last one not filled with zeros.
    """
    count = math.prod(shape)
    if len(content) != packed_size(count, bits):
        raise ValueError(
            f"{len(content)} bytes of packed weights: expected {packed_size(count, bits)} for "
            f"{count} levels of {bits} bits"
        )
    stream = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
    if stream[count * bits :].any():
        raise ValueError("packed weights: expected zeros behind the last level")
    columns = np.zeros((count, 8), np.uint8)
    columns[:, :bits] = stream[: count * bits].reshape(count, bits)
    columns[:, bits:] = columns[:, bits - 1 : bits]  # the sign goes on to the left
    return np.packbits(columns, axis=1, bitorder="little").view(np.int8).reshape(shape)
