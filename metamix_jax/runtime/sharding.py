"""The device mesh: one `data` axis; batches are sharded along it, everything else is replicated."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from metamix_jax.errors import UserError


def make_mesh() -> Mesh:
    """Returns the 1-D mesh over all devices of all processes."""
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=axis_types)


def check_batch_size(batch_size: int, mesh: Mesh, parts: int = 1) -> None:
    """Raises UserError unless each of `parts` micro-batches shards evenly over the devices."""
    if batch_size % (mesh.size * parts):
        of = [f"{mesh.size} (devices)"] if mesh.size > 1 else []
        of += [f"{parts} (config.accumulation_steps)"] if parts > 1 else []
        raise UserError(f"config.batch_size={batch_size}: expected a multiple of {' x '.join(of)}")


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, axis: int = 0) -> dict[str, jax.Array]:
    """Returns the global batch sharded over the devices, given this process's part of it.

    Its images lie along `axis`: 1 in a block of batches.
    """
    rows = NamedSharding(mesh, P(*[None] * axis, "data"))
    return {
        name: jax.make_array_from_process_local_data(rows, value) for name, value in batch.items()
    }


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns `tree` replicated on every device; leaves must be equal in all processes."""
    everywhere = NamedSharding(mesh, P())
    if jax.process_count() == 1:
        return jax.device_put(tree, everywhere)

    def copy(leaf: jax.Array) -> jax.Array:
        if not leaf.is_fully_addressable:
            return leaf  # already replicated
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = copy(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.make_array_from_process_local_data(everywhere, np.asarray(leaf), leaf.shape)

    return jax.tree.map(copy, tree)


def replicated_target(tree: Any, mesh: Mesh) -> Any:
    """Returns `tree` as abstract arrays, to be restored replicated on every device."""
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree
    )
