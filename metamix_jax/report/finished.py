"""Reads the files of a finished run for its report; only the workdir is read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metamix_jax.errors import UserError
from metamix_jax.workdir.files import read_json
from metamix_jax.workdir.metrics import read_rows

# Required keys of each file.
_RESULTS = (
    "mode", "model", "searcher", "top1", "top5", "correct", "examples", "gbops", "budget_gbops",
    "average_act_bits", "seconds", "statistics", "phases", "search_cost", "evaluations", "device",
    "versions",
)  # fmt: skip
_POLICY = ("model", "image_size", "searcher", "seed", "budget_gbops", "layers")

_DIAGNOSTICS = (
    "layer", "summary", "distances", "variance_traces", "quantized_variances", "sensitivity",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished run.

    workdir: its workdir.
    results: content of results.json.
    policy: content of policy.json; None for a full-precision run.
    config: content of config.json, flattened: "budget.value" -> 0.9.
    rows: rows of metrics.jsonl.
    diagnostics: content of diagnostics.json; None without a diagnosis.
    class_names: in the order of the labels; empty where they are not known.
    split_names: what was trained and evaluated on, where config.json does not say.
    """

    workdir: Path
    results: Mapping[str, Any]
    policy: Mapping[str, Any] | None
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]
    diagnostics: Mapping[str, Any] | None = None
    class_names: tuple[str, ...] = ()
    split_names: tuple[str, str] | None = None


def read_finished(workdir: Path) -> Finished:
    """Reads a workdir.

    Raises:
      UserError: a file is missing or invalid.
    """
    if not (workdir / "results.json").exists():
        raise UserError(
            f"{workdir}: no results.json; expected the workdir of a finished run (--mode=train)"
        )
    results = _read(workdir / "results.json", _RESULTS)
    policy = None
    if results["budget_gbops"] is not None:
        policy = _read(workdir / "policy.json", _POLICY)
    config = _flat(_read(workdir / "config.json", ()))
    try:
        rows = read_rows(workdir / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"{workdir / 'metrics.jsonl'}: not readable ({error})") from error
    diagnostics, path = None, workdir / "diagnostics.json"
    if path.exists():
        diagnostics = _read(path, _DIAGNOSTICS)
    path = workdir / "dataset.json"
    data = _read(path, ()) if path.exists() else {}
    names = {"class_names": tuple(data.get("classes", ())), "split_names": data.get("splits")}
    return Finished(workdir, results, policy, config, rows, diagnostics, **names)


def _read(path: Path, fields: tuple[str, ...]) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:  # ValueError: bad JSON or bad UTF-8
        raise UserError(f"{path}: not readable ({error})") from error
    missing = [name for name in fields if name not in content] if type(content) is dict else fields
    if missing or type(content) is not dict:
        raise UserError(
            f"{path}: lacks {', '.join(missing) or 'everything'}; expected a file of this version"
        )
    return content


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
