"""Who may run in a workdir: one run at a time, and always the same one."""

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.runtime import distributed
from metamix_jax.workdir import digests, lock
from metamix_jax.workdir.files import read_json, write_json

_OTHERS = {
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
) -> Iterator[None]:
    """Holds the workdir, new or with the same run in it, for as long as the block runs.

    Writes config.json, dataset.json and code.json, or checks that they say the same. A finished
    run may have been made by other code.

    Args:
      config: of the run.
      workdir: made if it is not there.
      dataset_facts: what identifies the data set.
      may_change: paths of the fields of `config` that may say something else there.

    Raises:
      UserError: not writable, in use, or holding a run with another configuration, data set or
        code.
    """
    with contextlib.ExitStack() as stack:
        error = None
        try:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock.hold(workdir))
            except OSError as reason:
                raise UserError(f"{workdir}: not usable as --workdir ({reason})") from reason
            check_same_run(config, workdir, dataset_facts, may_change)
        except UserError as found:
            error = found
        distributed.agree(error)
        yield


def check_same_run(
    config: ConfigDict, workdir: Path, dataset_facts: dict[str, Any], may_change: Collection[str]
) -> None:
    """Writes what identifies a run, or raises UserError where the workdir holds another one."""
    wanted = {"config.json": json.loads(config.to_json()), "dataset.json": dataset_facts}
    if not is_finished(workdir):
        wanted["code.json"] = digests.of_code()
    for name, new in wanted.items():
        path = workdir / name
        old = new
        if path.exists():
            try:
                old = dict(read_json(path))
            except (OSError, TypeError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({error}); remove it if you are sure that "
                                "the run there is this one") from error  # fmt: skip
        changed = _differences(old, new, may_change if name == "config.json" else ())
        if changed:
            raise UserError(
                f"{workdir} holds a run with {_OTHERS[name]} ({'; '.join(changed)}); use the "
                "same one or another --workdir"
                + (f", or remove {path} to go on all the same" if name == "code.json" else "")
            )
    # Only now, so that a refused run changes nothing.
    for name, new in wanted.items():
        path = workdir / name
        if not path.exists() or json.loads(path.read_text()) != new:
            write_json(path, new)


def is_finished(workdir: Path) -> bool:
    """Returns whether a run has come to its end in `workdir`; a search alone has not."""
    try:
        results = read_json(workdir / "results.json")
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and results.get("mode") == "train"


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str]
) -> list[str]:
    """Returns the fields that differ and may not, with both values."""
    old, new = _flat(old), _flat(new)
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
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
