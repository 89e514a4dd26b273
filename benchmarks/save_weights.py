"""Writes the weights of a finished run as an .npz file with PyTorch's names and layouts.

    python -m benchmarks.save_weights WORKDIR FILE.npz

The file is what config.pretrained takes; reading it gives the run's weights bit for bit, which is
checked. Optimizer state and quantization are left out, so a small network fits into a repository.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from metamix_jax import recipes
from metamix_jax.networks import registry
from metamix_jax.networks.torch_weights import torch_name
from metamix_jax.runtime import sharding
from metamix_jax.training import setup
from metamix_jax.training.start_weights import load_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    config, mesh = recipes.from_workdir(options.workdir), sharding.make_mesh()
    network = setup.make_network(config, searches=False)
    weights, step = load_weights(options.workdir, network, mesh)
    names = registry.architecture_of(network.model).torch_names
    entries = {
        torch_name(path, names): _to_torch_layout(path, np.asarray(leaf))
        for path, leaf in traverse_util.flatten_dict(weights).items()
    }
    np.savez_compressed(options.file, **entries)
    again, _ = load_weights(options.file, network, mesh)
    jax.tree.map(np.testing.assert_array_equal, again, weights)
    total, size = sum(leaf.size for leaf in entries.values()), options.file.stat().st_size
    print(f"{options.file}: step {step}, {len(entries)} arrays, {total:,} numbers, {size:,} bytes")


def _to_torch_layout(path: tuple[str, ...], leaf: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return leaf
    return leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T


if __name__ == "__main__":
    main()
