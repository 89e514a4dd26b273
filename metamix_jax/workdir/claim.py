"""Claiming a workdir: one process at a time, and always for the same run."""

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.runtime import distributed
from metamix_jax.workdir import digests, lock
from metamix_jax.workdir.files import read_json, usable, write_json

_MISMATCHES = {
    "config.json": "another configuration",
    "dataset.json": "another data set",
    "code.json": "another version of the code",
}


@contextlib.contextmanager
def claim_workdir(
    config: ConfigDict,
    workdir: Path,
    dataset_facts: dict[str, Any],
    may_change: Collection[str],
    sources: Collection[Path] = (),
) -> Iterator[None]:
    """Locks the workdir, new or of the same run, for the duration of the block.

    Writes config.json, dataset.json and code.json, or checks that they match. A finished run may
    come from another version of the code.

    Args:
      config: of the run.
      workdir: made if it is not there.
      dataset_facts: what identifies the data set.
      may_change: paths of the fields of `config` that may say something else there.
      sources: files outside the package that determine the results.

    Raises:
      UserError: the workdir is not writable, is in use, or holds a run with another configuration,
        data set or version of the code.
    """
    with contextlib.ExitStack() as stack:
        error = None
        try:
            with usable(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock.hold(workdir))
            check_same_run(config, workdir, dataset_facts, may_change, sources)
        except UserError as found:
            error = found
        distributed.agree(error)
        yield


def check_same_run(
    config: ConfigDict,
    workdir: Path,
    dataset_facts: dict[str, Any],
    may_change: Collection[str],
    sources: Collection[Path] = (),
) -> None:
    """Writes the files that identify a run; raises UserError if the workdir holds another run."""
    wanted = {"config.json": json.loads(config.to_json()), "dataset.json": dataset_facts}
    if not is_finished(workdir):
        wanted["code.json"] = digests.of_code(sources)
    for name, new in wanted.items():
        path = workdir / name
        old = new
        if path.exists():
            try:
                old = dict(read_json(path))
            except (OSError, TypeError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({error}); remove it if you are sure that "
                                "the workdir holds this run") from error  # fmt: skip
        changed = _differences(old, new, may_change if name == "config.json" else ())
        if changed:
            raise UserError(
                f"{workdir} holds a run with {_MISMATCHES[name]} ({'; '.join(changed)}); use the "
                "same one or another --workdir"
                + (f", or remove {path} to resume anyway" if name == "code.json" else "")
            )
    # Written last, so that a refused run changes nothing.
    for name, new in wanted.items():
        path = workdir / name
        if not path.exists() or json.loads(path.read_text(encoding="utf-8")) != new:
            write_json(path, new)


def is_finished(workdir: Path) -> bool:
    """Returns whether `workdir` holds a finished training run; --mode=search does not count."""
    try:
        results = read_json(workdir / "results.json")
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and results.get("mode") == "train"


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str]
) -> list[str]:
    """Returns the changed fields that affect the result, each with both values."""
    old, new = _flat(old), _flat(new)
    return [
        f"{key}: was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in may_change
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
