"""Small files of a workdir, written as a whole or not at all."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MOST_JSON_BYTES = 2**26


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds; OSError or ValueError, whatever may be in its place."""
    if path.exists() and not path.is_file():
        raise ValueError("not a file")  # reading a pipe would wait for ever
    if path.exists() and path.stat().st_size > _MOST_JSON_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes, too many for a file of this kind")
    try:
        return json.loads(path.read_text())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, keys in their order, atomically; NaN becomes null."""
    write_text_atomic(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Writes UTF-8 text so that `path` always holds the old or the new content as a whole."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Writes bytes so that `path` always holds the old or the new content as a whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """Returns `value` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
