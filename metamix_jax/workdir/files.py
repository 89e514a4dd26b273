"""Small files of a workdir, written atomically."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metamix_jax.errors import UserError

_MAX_JSON_BYTES = 2**26


@contextlib.contextmanager
def usable(workdir: Path) -> Iterator[None]:
    """Explains in one line why files cannot be written to a workdir; raises UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{workdir}: not usable as --workdir ({error.strerror or error}); use a writable "
            "directory"
        ) from error


def make_workdir(workdir: Path) -> None:
    """Creates a workdir where there is none; raises UserError where that is impossible."""
    with usable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not a regular file, too large, or not JSON.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a file")  # reading a pipe would block forever
    if path.exists() and (size := _size(path)) > _MAX_JSON_BYTES:
        raise ValueError(f"{size} bytes; expected at most {_MAX_JSON_BYTES}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _size(path: Path) -> int:
    found = path.stat()
    return found.st_size if hasattr(found, "st_size") else found.length  # in a bucket


def write_json(path: Path, value: Any) -> None:
    """Writes `value` atomically as indented JSON, keys in order; non-finite numbers become null."""
    write_text_atomic(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically: `path` holds either the old or the new content."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Writes bytes atomically: `path` holds either the old or the new content."""
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
    """Returns `value` converted to plain JSON types; non-finite numbers become None."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
