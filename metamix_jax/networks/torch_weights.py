"""Trained PyTorch-style weights (.npz, .safetensors, .pth) as Flax variables.

All or nothing: every leaf of the network must be found, every entry of the file used, and every
shape equal. Files are never unpickled in a way that could run code, so untrusted files are safe.
"""

import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from metamix_jax.errors import UserError
from metamix_jax.networks.architecture import Rules, TorchNames

LEAF_NAMES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
PREFIX = r"^((module|_orig_mod)\.)+"  # added to every name by DataParallel and torch.compile
BATCH_COUNTER = "num_batches_tracked"  # BatchNorm's step counter; Flax has none
# Keys under which training scripts keep the weights, and averages of them, the first found counts.
WRAPPERS = (
    "state_dict", "model_state_dict", "model", "net",
    "ema_state_dict", "state_dict_ema", "model_ema", "ema",
)  # fmt: skip
NO_FLOATS = "expected float16, bfloat16, float32 or float64"
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
MOST_BYTES = 2**30  # far more than any network here has; small files can decompress to any size
SHOWN = 5  # entries of each kind of problem named in an error


class MappedEntry(NamedTuple):
    """An imported array: its name in the file, our path, and its shape in Flax layout."""

    source: str
    path: str
    shape: tuple[int, ...]


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a weight file as float32 arrays with the file's own names and layouts.

    BatchNorm's integer batch counters are left out. Raises UserError, one line naming the file, if
    it is missing, damaged, of an unknown type, or contains anything but float arrays.
    """
    path = Path(path)
    reader = next((read for end, read in READERS.items() if path.name.lower().endswith(end)), None)
    if reader is None:
        raise UserError(f"{path}: unknown file type, expected {', '.join(READERS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    try:
        _require_small(path, path.stat().st_size)
        entries = reader(path)
        _require_small(path, sum(4 * getattr(value, "size", 0) for value in entries.values()))
    except UserError:
        raise
    except Exception as error:  # the libraries may raise anything, even MemoryError
        raise UserError(f"{path}: {_read_failure(error)}") from error
    return {
        name: _as_float32(path, name, value)
        for name, value in entries.items()
        if name.split(".")[-1] != BATCH_COUNTER
    }


def torch_name(path: tuple[str, ...], names: TorchNames) -> str:
    """Returns the torch name of a Flax leaf, ('params', 'conv1', 'kernel') -> 'conv1.weight'."""
    collection, *modules, leaf = path
    if (collection, leaf) not in LEAF_NAMES and collection != "params":
        known = ", ".join("/".join(pair) for pair in LEAF_NAMES)
        raise ValueError(f"{'/'.join(path)} has no torch name; known leaves: {known}")
    module = _rename(".".join(modules), names.modules)
    # A network's own parameters, such as a class token, have the same name there.
    leaf = LEAF_NAMES.get((collection, leaf), leaf)
    return f"{module}.{leaf}" if module else leaf


def load_pretrained(
    path: str | Path, variables: Mapping[str, Any], names: TorchNames
) -> tuple[dict[str, Any], list[MappedEntry]]:
    """Returns `variables` with params and batch_stats from a weight file, and the entries used.

    Kernels change layout: convolutions [out, in/groups, h, w] -> [h, w, in/groups, out], dense
    layers [out, in] -> [in, out]. `variables` is not modified; other collections are passed
    through. Raises one UserError listing all missing, extra, misshapen, non-finite and
    negative entries.
    """
    collections = [name for name in ("params", "batch_stats") if name in variables]
    targets = traverse_util.flatten_dict({name: variables[name] for name in collections})
    sources, extra = _normalise(read_weights(path), names)
    missing, misshapen, non_finite, negative = [], [], [], []
    loaded, report = {}, []
    for target, leaf in targets.items():
        name, ours = torch_name(target, names), "/".join(target)
        if name not in sources:
            missing.append(f"{name} (our {ours} {tuple(leaf.shape)})")
            continue
        source, original = sources.pop(name)
        value = _to_flax_layout(target, original)
        if value.shape != tuple(leaf.shape):
            turned = f" = {value.shape} in our layout" if value.ndim > 1 else ""
            misshapen.append(f"{source} {original.shape}{turned} (our {ours} {tuple(leaf.shape)})")
        elif not np.isfinite(value).all():
            non_finite.append(f"{source} (our {ours})")
        elif target[-1] == "var" and value.min() < 0:
            negative.append(f"{source} (our {ours}, down to {value.min():g})")
        else:
            loaded[target] = jnp.array(value, dtype=leaf.dtype)
            report.append(MappedEntry(source, ours, value.shape))
    extra += [f"{source!r} {value.shape}" for source, value in sources.values()]
    problems = {
        f"missing of the network's {len(targets)}": missing,
        "extra in the file": extra,
        "of another shape": misshapen,
        "with NaN or infinity": non_finite,
        "with negative variances": negative,
    }
    texts = [_summary(kind, entries) for kind, entries in problems.items() if entries]
    if texts:
        raise UserError(f"{path} does not fit this network: {'; '.join(texts)}")
    return {**variables, **traverse_util.unflatten_dict(loaded)}, report


def format_report(report: list[MappedEntry]) -> str:
    """Returns a table with one line per imported entry, and a last line with totals."""
    rows = [("in the file", "here", "shape")] + [
        (entry.source, entry.path, "x".join(map(str, entry.shape))) for entry in report
    ]
    source_width, path_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{row[0]:<{source_width}}  {row[1]:<{path_width}}  {row[2]}" for row in rows]
    total = sum(int(np.prod(entry.shape)) for entry in report)
    return "\n".join([*lines, f"{len(report)} entries, {total:,} values"])


def _read_npz(path: Path) -> dict[str, Any]:
    # np.load would take other files for a .npy array or a pickle, with a misleading error.
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not an .npz archive; damaged, or another type of file?")
    with zipfile.ZipFile(path) as archive:
        _require_small(path, sum(entry.file_size for entry in archive.infolist()))
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        import torch  # optional, only needed for these files
    except ImportError as error:
        raise UserError(
            f"{path}: reading {path.suffix} files needs PyTorch: pip install torch, "
            "or convert the file to .npz or .safetensors"
        ) from error
    # torch.load does not verify the checksums of its own format.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _require_small(path, sum(entry.file_size for entry in archive.infolist()))
            damaged = archive.testzip()
            names = {entry.filename.partition("/")[2] for entry in archive.infolist()}
        if damaged:
            raise UserError(f"{path}: damaged, wrong checksum of {damaged}")
        if "constants.pkl" in names:
            raise UserError(
                f"{path}: a TorchScript program, expected a state_dict; save its weights with "
                f"torch.save(torch.jit.load({path.name!r}).state_dict(), ...)"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols; unreadable files still raise
        entries = torch.load(path, weights_only=True, map_location="cpu")
    entries = _unwrapped(path, entries)
    if not isinstance(entries, Mapping):
        raise UserError(f"{path}: contains a {type(entries).__name__}, expected a state_dict")
    arrays = {}
    for name, value in entries.items():
        if isinstance(value, torch.Tensor):
            value = value.detach()
            _require_small(path, 4 * value.numel())  # an expanded tensor is stored as one number
            if value.is_floating_point() and value.itemsize == 1:
                kind = str(value.dtype).removeprefix("torch.")
                raise UserError(f"{path}: entry {name!r} is {kind}, {NO_FLOATS}")
            # NumPy has no bfloat16; integers are unchanged, to be rejected by name later.
            value = (value.float() if value.is_floating_point() else value).numpy()
        arrays[str(name)] = value
    return arrays


def _unwrapped(path: Path, entries: Any) -> Any:
    """Returns the weights of a training script's file, which may hold more than one network."""
    while isinstance(entries, Mapping):
        found = [key for key in WRAPPERS if isinstance(entries.get(key), Mapping)]
        if not found:
            break
        if others := ", ".join(map(repr, found[1:])):
            logging.info("%s: weights of %r; not used: %s", path, found[0], others)
        entries = entries[found[0]]
    return entries


def _read_safetensors(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) if size <= _MOST_HEADER_BYTES else {}
    for name, entry in header.items() if isinstance(header, Mapping) else ():
        kind = entry.get("dtype", "") if isinstance(entry, Mapping) else ""
        if kind.startswith("F8"):  # the library would only say that its NumPy type is unknown
            raise UserError(f"{path}: entry {name!r} is float8 ({kind}), {NO_FLOATS}")
    return safetensors.numpy.load_file(path)


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {  # by the end of the file's name
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".th": _read_torch,
    ".pth.tar": _read_torch,
}


def _require_small(path: Path, size: int) -> None:
    if size > MOST_BYTES:
        raise UserError(
            f"{path}: {size / 2**20:.0f} MiB of weights, expected at most {MOST_BYTES >> 20}"
        )


def _read_failure(error: Exception) -> str:
    """Returns in one line why a library failed, without its advice to disable safety."""
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)", text)
    save_again = "save only the weights, in PyTorch with torch.save(model.state_dict(), ...)"
    if refused or "allow_pickle" in text:
        object_name = f" ({refused[1]})" if refused else ""
        return f"refused, contains Python objects{object_name}, which can run code; {save_again}"
    if isinstance(error, pickle.UnpicklingError):
        return f"damaged, or contains more than plain tensors; {save_again}"
    first_sentence = text.strip().split("\n")[0].split(". ")[0][:120]
    return f"cannot be read, damaged? ({type(error).__name__}: {first_sentence or 'no details'})"


def _as_float32(path: Path, name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise UserError(
            f"{path}: entry {name!r} is of type {type(value).__name__}, expected an array"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):  # knows bfloat16, which np.issubdtype doesn't
        raise UserError(f"{path}: entry {name!r} is {value.dtype}, {NO_FLOATS}")
    with np.errstate(over="ignore"):  # float64 beyond float32: infinite, reported by name later
        return value.astype(np.float32)


def _normalise(
    weights: dict[str, np.ndarray], names: TorchNames
) -> tuple[dict[str, tuple[str, np.ndarray]], list[str]]:
    """Returns torch name -> (name in the file, value), and the entries with a duplicate name."""
    sources, repeated = {}, []
    for source, value in weights.items():
        name = _rename(source, ((PREFIX, ""), *names.aliases))
        if name in sources:
            repeated.append(f"{source!r} (the same as {sources[name][0]!r})")
        else:
            sources[name] = (source, value)
    return sources, repeated


def _to_flax_layout(target: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    if target[-1] != "kernel":
        return value
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _summary(kind: str, entries: list[str]) -> str:
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return f"{len(entries)} {kind}: {', '.join(entries[:SHOWN])}{more}"
