"""Digests of a checkpoint's content, to detect damage on restore, and of the source code.

Orbax detects missing and truncated files but silently restores flipped bits in array data.
"""

import concurrent.futures
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

_LENGTH = 32  # hexadecimal characters
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Subpackages that cannot affect training. The recipes are one only once installed, and what they
# say is in config.json.
_NOT_TRAINING = ("report", "exporters", "commands", "configs")


def host_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Returns path -> leaf as a NumPy array on the host; PRNG keys as their key data."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): _raw(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return jax.device_get(leaves)


def of_arrays(tree: Any) -> dict[str, str]:
    """Returns path -> digest of the dtype, shape and bytes of every leaf of a tree of arrays."""
    leaves = host_leaves(tree)
    # hashlib releases the GIL on large arrays.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(leaves, pool.map(_of_array, leaves.values()), strict=True))


def of_json(value: Mapping[str, Any]) -> str:
    """Returns the digest of a JSON-serializable mapping, independent of key order."""
    return _digest(json.dumps(value, sort_keys=True).encode())


def of_code(others: Collection[Path] = ()) -> dict[str, str]:
    """Returns what determines a run's bits: library versions and digests of sources.

    Args:
      others: files besides our own, such as that of the user's network.
    """
    root = Path(__file__).parents[1]
    sources = {str(path.relative_to(root)): path for path in root.rglob("*.py")}
    contents = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sources.items()
        if Path(name).parts[0] not in _NOT_TRAINING
    }
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    own = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:_LENGTH] for path in others}
    return {"metamix_jax": of_json(contents), **versions, **own}


def _of_array(array: np.ndarray) -> str:
    flat = np.ascontiguousarray(array).reshape(-1)
    return _digest(f"{array.dtype.name}{array.shape}".encode(), flat.view(np.uint8).data)


def _digest(*parts: bytes | memoryview) -> str:
    # SHA-256 has hardware support, which makes it faster here than BLAKE2.
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:_LENGTH]


def _raw(leaf: jax.Array) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf
