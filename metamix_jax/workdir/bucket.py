"""Workdirs in a bucket: --workdir=gs://BUCKET/FOLDER.

Orbax writes checkpoints directly to the bucket. All other files are small: they are written to a
local mirror, laid out like any workdir, and uploaded before each checkpoint and at the end. The
bucket's metrics.jsonl therefore always has every row up to the newest checkpoint; later rows are
dropped on resume, as after any kill.

The mirror records the URL it belongs to (`.mirror.json`), so that a path inside it can be mapped
to the one in the bucket.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from metamix_jax.errors import InterruptedRunError, RunError, UserError
from metamix_jax.workdir import lock

SCHEME = "gs://"
CHECKPOINTS = "checkpoints"  # directories of this name are never mirrored
_NOTE = ".mirror.json"  # url; sent: file -> its size and mtime when last in sync with the bucket
_ANSWER_SECONDS = 15.0


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def path_of(text: str | os.PathLike[str]) -> Path:
    """Returns a user-supplied path, local (~ is expanded) or in a bucket, as a readable Path.

    Raises:
      UserError: it is in a bucket that cannot be reached, or this locale cannot express it.
    """
    if not is_remote(text):
        return _local(text)
    _require_bucket(os.fspath(text))
    return epath.Path(text)


def _local(text: str | os.PathLike[str]) -> Path:
    """Returns a local path; the libraries that write checkpoints take all paths as UTF-8."""
    path = Path(text).expanduser()
    whole = str(path.absolute())
    if os.fsencode(whole) != whole.encode("utf-8", "replace"):
        encoding = sys.getfilesystemencoding()
        raise UserError(
            f"{ascii(whole)}: letters outside ASCII in a locale with encoding {encoding}; expected "
            "UTF-8: set PYTHONUTF8=1, or use another path"
        )
    try:
        path.exists()
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{path}: not a possible path ({error.strerror})") from error
    return path


def origin(path: Path) -> Path:
    """Returns the bucket path of a path inside a local mirror; other paths unchanged."""
    found = _mirror_of(path)
    if found is None:
        return path
    folder, note = found
    return epath.Path(note["url"]) / path.relative_to(folder)


@contextlib.contextmanager
def opened(workdir: str, *, alone: bool) -> Iterator[Path]:
    """Yields the directory to work in: `workdir`, or a local mirror if it is in a bucket.

    Changes in the mirror are uploaded when the block ends, even after an error. With several
    processes only process 0 reads and writes files; its errors stop all of them.

    Args:
      workdir: the value of --workdir.
      alone: whether to lock the bucket's folder for the duration of the block.

    Raises:
      UserError: the bucket cannot be reached or read, or another run holds the folder's lock.
      RunError: an upload failed.
    """
    if not is_remote(workdir):
        yield _local(workdir)
        return
    from metamix_jax.runtime import distributed  # imports JAX, which the report must not need

    url = workdir.rstrip("/")
    folder = Path(tempfile.mkdtemp(prefix="metamix_jax_"))
    try:
        with contextlib.ExitStack() as stack:
            error = None
            try:
                with distributed.others_wait() as on_wait:
                    _require_bucket(url)
                    if alone and distributed.is_first():
                        stack.enter_context(lock.hold_object(url, on_wait))
                sent = _pull(epath.Path(url), folder) if distributed.is_first() else {}
                _write_note(folder, {"url": url, "sent": sent})
            except UserError as found:
                error = found
            except Exception as reason:  # the libraries raise many types
                error = UserError(f"--workdir={url}: cannot be read ({_one_line(reason)})")
            distributed.agree(error)
            if error is not None:
                raise error  # process 0 had none: only this process failed
            try:
                yield folder
                if distributed.is_first():
                    push(folder)
            except (UserError, RunError, InterruptedRunError) as reason:
                if distributed.is_first():
                    with contextlib.suppress(RunError):
                        push(folder)
                raise type(reason)(str(reason).replace(str(folder), url)) from reason
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def fetched(path: Path) -> Iterator[Path]:
    """Yields a local directory with the files of `path`: itself, or a temporary copy."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="metamix_jax_") as folder:
        _pull(path, Path(folder))
        yield Path(folder)


def push(path: Path) -> None:
    """Uploads the files changed in a local mirror; does nothing for any other directory.

    Raises:
      RunError: a file could not be written; names the file.
    """
    found = _mirror_of(path)
    if found is None:
        return
    folder, note = found
    sent = note["sent"]
    for file in _files(folder):
        name, state = str(file.relative_to(folder)), _state(file)
        if sent.get(name) == state:
            continue
        try:
            (epath.Path(note["url"]) / name).write_bytes(file.read_bytes())
        except Exception as error:  # the libraries raise many types
            raise not_written(epath.Path(note["url"]) / name, error) from error
        sent[name] = state
    _write_note(folder, note)


def not_written(path: Path, error: Exception) -> RunError:
    """Returns the error for a failed write to a bucket."""
    return RunError(
        f"{path}: cannot be written ({_one_line(error)}); complete checkpoints are kept, run the "
        "same command to resume from the newest"
    )


def _pull(source: Path, folder: Path) -> dict[str, str]:
    """Downloads the files of `source`; returns file -> `_state` of its copy."""
    sent = {}
    for file in _files(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
        sent[str(target.relative_to(folder))] = _state(target)
    return sent


def _files(folder: Path) -> Iterator[Path]:
    """Yields the files below a directory, if it exists, except checkpoints and hidden files."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or path.name in ("", folder.name, CHECKPOINTS):
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _state(file: Path) -> str:
    found = file.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def _mirror_of(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the local mirror that contains `path`, and the content of its `.mirror.json`."""
    if is_remote(path):
        return None
    for folder in (path, *path.parents):
        if (folder / _NOTE).is_file():
            return folder, json.loads((folder / _NOTE).read_text(encoding="utf-8"))
    return None


def _write_note(folder: Path, note: dict[str, Any]) -> None:
    (folder / _NOTE).write_text(json.dumps(note), encoding="utf-8")


def _require_bucket(url: str) -> None:
    bucket, _, name = url.removeprefix(SCHEME).partition("/")
    if not bucket or not name:
        raise UserError(f"{url}: expected gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{url}: gs:// paths need the package gcsfs; pip install gcsfs")
    if reason := _unreachable(bucket):
        raise UserError(
            f"{url}: the bucket {bucket} cannot be reached ({reason}); check its name, the "
            "credentials (gcloud auth application-default login, or a service account) and their "
            "permissions (storage.buckets.get, storage.objects.*)"
        )


@functools.cache
def _unreachable(bucket: str) -> str:
    """Returns why a bucket cannot be reached; "" if it can."""
    # Always use the tested backend: not TensorFlow's where that is installed, nor gcsfs's support
    # for hierarchical buckets, which queries another service for the type of every bucket.
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # They log every file at INFO, and at ERROR tracebacks of what our own message says.
    for library in ("fsspec", "gcsfs"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    import fsspec
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY

    # TensorStore and other processes write to the bucket too, so cached listings go stale.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    try:
        # Orbax's first request, too.
        retry = DEFAULT_RETRY.with_timeout(_ANSWER_SECONDS)
        storage.Client().get_bucket(bucket, timeout=_ANSWER_SECONDS, retry=retry)
    except Exception as error:  # many types: name, credentials, permissions, network
        return _one_line(error)
    return ""


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")
