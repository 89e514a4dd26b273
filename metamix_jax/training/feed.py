"""The training batches of a run, in the form that its step takes: single or in blocks."""

import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from metamix_jax.data import batching
from metamix_jax.data.datasets import Dataset
from metamix_jax.runtime import sharding
from metamix_jax.training import setup
from metamix_jax.training.step import blocks
from metamix_jax.training.step.state import Batch


class Feed:
    """Reads a run's training batches.

    block_steps: most steps of a block (blocks.py); 0: the step takes single batches.
    resident: `image` and `label` of the training split, where it is kept on the device.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset, mesh: Mesh):
        self._config, self._dataset, self._mesh = config, dataset, mesh
        self.block_steps = blocks.block_steps(config, dataset.train)
        arrays = {}
        if self.block_steps and blocks.fits_on_device(dataset.train):
            arrays = {"image": dataset.train.images, "label": dataset.train.labels}
        self.resident: Batch = sharding.replicate(arrays, mesh)

    def batches(self, start: int, stop: int) -> Iterator[dict[str, jax.Array]]:
        """Yields the global batches of steps start to stop - 1, sharded over the devices."""
        return setup.train_batches(self._config, self._dataset, self._mesh, start, stop)

    def block_lengths(self, start: int, stop: int) -> tuple[int, ...]:
        """Returns the lengths of the blocks that cover steps start to stop - 1."""
        every = blocks.intervals(self._config)
        return tuple(blocks.block_lengths(start, stop, max(self.block_steps, 1), every))

    def blocks(
        self, start: int, lengths: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Yields the steps from `start` on as (number of steps, what the step takes)."""
        stop = start + sum(lengths)
        if not self.block_steps:
            yield from ((1, batch) for batch in self.batches(start, stop))
            return
        batches = batching.train_batches(
            self._dataset.train,
            seed=self._config.seed,
            batch_size=self._config.batch_size,
            start=start,
            stop=stop,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            images=not self.resident,
        )
        for length in lengths:
            rows = list(itertools.islice(batches, length))
            block = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            yield length, sharding.shard_batch(block, self._mesh, axis=1)
