"""Workdirs in a bucket, --workdir=gs://BUCKET/FOLDER.

Checkpoints go straight there, which is Orbax's business. Everything else is small: it is written to
a local folder, as for any workdir, and copied to the bucket before each checkpoint is saved and at
the end. The bucket's metrics.jsonl hence always holds all rows up to the newest checkpoint; what it
holds beyond that is dropped when a run goes on, as after any kill.

The local folder says itself what it is a copy of (`.mirror.json`), so that whoever is handed a path
in it can ask for the one in the bucket.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from metamix_jax.errors import InterruptedRunError, RunError, UserError
from metamix_jax.workdir import lock

SCHEME = "gs://"
CHECKPOINTS = "checkpoints"  # the folders that are never copied
_NOTE = ".mirror.json"  # url; sent: file -> what it was like when the bucket's was the same
_ANSWER_SECONDS = 15.0


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is one in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def path_of(text: str | os.PathLike[str]) -> Path:
    """Returns what a user's text names, as a path that can be read wherever it is.

    Raises:
      UserError: it is in a bucket that cannot be reached.
    """
    if not is_remote(text):
        return Path(text)
    _require_bucket(os.fspath(text))
    return epath.Path(text)


def origin(path: Path) -> Path:
    """Returns the path in the bucket of one in a local copy; any other path as it is."""
    found = _mirror_of(path)
    if found is None:
        return path
    folder, note = found
    return epath.Path(note["url"]) / path.relative_to(folder)


@contextlib.contextmanager
def opened(workdir: str, *, alone: bool) -> Iterator[Path]:
    """The folder to work in: `workdir`, or a local copy of what is there in the bucket.

    What is new in the copy when the block ends is written to the bucket, after an error too. Of
    several processes only the first reads and writes files; its errors end all of them.

    Args:
      workdir: what --workdir says.
      alone: whether the bucket's folder is locked for as long as the block runs.

    Raises:
      UserError: the bucket cannot be reached or read, or another run holds the folder.
      RunError: it cannot be written to any more.
    """
    if not is_remote(workdir):
        yield Path(workdir)
        return
    from metamix_jax.runtime import distributed  # imports JAX, which the report does without

    url = workdir.rstrip("/")
    folder = Path(tempfile.mkdtemp(prefix="metamix_jax_"))
    try:
        with contextlib.ExitStack() as stack:
            error = None
            try:
                with distributed.others_wait() as look:
                    _require_bucket(url)
                    if alone and distributed.is_first():
                        stack.enter_context(lock.hold_object(url, look))
                sent = _pull(epath.Path(url), folder) if distributed.is_first() else {}
                _write_note(folder, {"url": url, "sent": sent})
            except UserError as found:
                error = found
            except Exception as reason:  # of many kinds, by what the library meets
                error = UserError(f"--workdir={url}: cannot be read ({_one_line(reason)})")
            distributed.agree(error)
            if error is not None:
                raise error  # of this process alone
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
    """A local folder with what is in `path`: itself, or a copy that goes with the block."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="metamix_jax_") as folder:
        _pull(path, Path(folder))
        yield Path(folder)


def push(path: Path) -> None:
    """Writes what has changed in a local copy to the bucket; does nothing with another folder.

    Raises:
      RunError: that was not possible; says which file.
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
        except Exception as error:  # of many kinds, by what the library meets
            raise not_written(epath.Path(note["url"]) / name, error) from error
        sent[name] = state
    _write_note(folder, note)


def not_written(path: Path, error: Exception) -> RunError:
    """Returns what to say where something in a bucket could not be written."""
    return RunError(
        f"{path}: cannot be written ({_one_line(error)}); complete checkpoints are kept, the same "
        "command goes on from the newest"
    )


def _pull(source: Path, folder: Path) -> dict[str, str]:
    """Copies the files of `source`; returns file -> what its copy is like."""
    sent = {}
    for file in _files(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
        sent[str(target.relative_to(folder))] = _state(target)
    return sent


def _files(folder: Path) -> Iterator[Path]:
    """Yields the files in a folder, if there is one, but for checkpoints and hidden ones."""
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
    """Returns the local copy that `path` is in, and its note."""
    if is_remote(path):
        return None
    for folder in (path, *path.parents):
        if (folder / _NOTE).is_file():
            return folder, json.loads((folder / _NOTE).read_text())
    return None


def _write_note(folder: Path, note: dict[str, Any]) -> None:
    (folder / _NOTE).write_text(json.dumps(note))


def _require_bucket(url: str) -> None:
    bucket, _, name = url.removeprefix(SCHEME).partition("/")
    if not bucket or not name:
        raise UserError(f"{url}: expected gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{url}: gs:// needs a package that is not there; pip install gcsfs")
    if reason := _unreachable(bucket):
        raise UserError(
            f"{url}: the bucket {bucket} cannot be reached ({reason}); is its name right, are "
            "there credentials (gcloud auth application-default login, or a service account), and "
            "may they use it (storage.buckets.get, storage.objects.*)?"
        )


@functools.cache
def _unreachable(bucket: str) -> str:
    """Returns why a bucket cannot be reached; an empty text if it can."""
    # One way to each bucket, the one that is tested: not TensorFlow's, where that is installed, nor
    # gcsfs's for other kinds of buckets, which asks another service what kind each one is.
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Their INFO tells of every file, their ERROR holds a traceback of what our own line says.
    for library in ("fsspec", "gcsfs"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    import fsspec
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY

    # TensorStore and other processes write there too: what was listed before may no longer be so.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    try:
        # Orbax asks this first, too.
        retry = DEFAULT_RETRY.with_timeout(_ANSWER_SECONDS)
        storage.Client().get_bucket(bucket, timeout=_ANSWER_SECONDS, retry=retry)
    except Exception as error:  # of many kinds: name, credentials, permissions, network
        return _one_line(error)
    return ""


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")
