"""Evaluation: every example exactly once, on any number of devices."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from metamix_jax.data import batching, datasets
from metamix_jax.networks.precision import FULL, Bits, Precision, bit_candidates
from metamix_jax.runtime import sharding
from metamix_jax.selection import cost, policy
from metamix_jax.training import nonfinite, setup
from metamix_jax.training.step.batch_step import training_images


def uniform_precisions(
    network: setup.Network, config_quant: ConfigDict, evaluation: Precision
) -> dict[Bits, Precision]:
    """Returns `evaluation` with uniform widths, for each pair of candidate widths."""
    pairs = bit_candidates(config_quant.act_bits, config_quant.weight_bits)
    uniform = {bits: cost.uniform_bits(network.costs, *bits) for bits in pairs}
    return {
        bits: evaluation.replace(branches=policy.branches(chosen, network.costs))
        for bits, chosen in uniform.items()
    }


class Evaluator:
    """Evaluates a network on a data set; compiles once per kind of `Precision`, not per policy."""

    def __init__(self, model: nn.Module, dataset: datasets.Dataset, config: ConfigDict, mesh: Mesh):
        self._model, self._dataset, self._config, self._mesh = model, dataset, config, mesh
        # Rounded up to a multiple of the devices; padding is masked out.
        size = min(config.eval.batch_size, len(dataset.evaluation))
        self._batch_size = -(-size // mesh.size) * mesh.size
        self._count = jax.jit(self._count_batch)
        self._statistics = jax.jit(self._batch_statistics)

    def __call__(self, variables: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
        """Returns top1 and top5 in percent, `correct` and `examples` as counts, and the mean loss.

        Args:
          variables: params, batch_stats and quant.
          precision: how the layers run; needs branches where activations are "chosen".
        """
        # Not by the scores alone: XLA's fusion of relu and mean on CPUs turns NaN into 0.
        broken = nonfinite.broken_leaves(variables)
        if broken:
            logging.warning("%s not finite: every image counts as wrong", nonfinite.listed(broken))
        totals = {"correct": 0, "correct_top5": 0, "examples": 0, "loss": 0.0}
        batches = batching.eval_batches(
            self._dataset.evaluation,
            batch_size=self._batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for batch in batches:
            counts = self._count(variables, sharding.shard_batch(batch, self._mesh), precision)
            for name, value in counts.items():
                totals[name] += value.item()
        if broken:
            totals |= {"correct": 0, "correct_top5": 0, "loss": math.nan}
        examples = totals["examples"]
        return {
            "top1": 100 * totals["correct"] / examples,
            "top5": 100 * totals["correct_top5"] / examples,
            "correct": totals["correct"],
            "examples": examples,
            "loss": totals["loss"] / examples,
        }

    def by_statistics(
        self, variables: Mapping[str, Any], precision: Precision
    ) -> dict[str, dict[str, Any]]:
        """Returns results with the running batch norm statistics and, if configured, re-estimated.

        The running statistics are those of full precision, which is therefore evaluated only with
        them.
        """
        results = {"running": self(variables, precision)}
        reestimated = self._config.eval.bn_reestimate_batches and variables["batch_stats"]
        if reestimated and precision != FULL:
            statistics = self.reestimate(variables, precision)
            results["re-estimated"] = self(variables | {"batch_stats": statistics}, precision)
        return results

    def reestimate(self, variables: Mapping[str, Any], precision: Precision) -> Any:
        """Returns batch_stats averaged over training batches run at `precision`.

        Uses the first config.eval.bn_reestimate_batches batches of the run, augmented as in
        training: statistics of clean images do not suit weights trained on augmented ones (measured
        on CIFAR-10 with zero-padded crops: 3.4 points lower).
        """
        stop = self._config.eval.bn_reestimate_batches
        batches = setup.train_batches(self._config, self._dataset, self._mesh, 0, stop)
        statistics = [self._statistics(variables, batch, precision) for batch in batches]
        return jax.tree.map(lambda *parts: sum(parts) / len(parts), *statistics)

    def _count_batch(self, variables, batch, precision):
        options = self._config.data
        images = batching.preprocess(batch["image"], mean=options.mean, std=options.std)
        scores = self._model.apply(variables, images, train=False, precision=precision)
        label, mask = batch["label"], batch["mask"]
        own = jnp.take_along_axis(scores, label[:, None], axis=-1)
        ahead = jnp.sum(scores > own, axis=-1)
        # Comparisons with NaN are false, which would count NaN scores as correct.
        mask_finite = mask & jnp.isfinite(scores).all(axis=-1)
        loss = optax.softmax_cross_entropy_with_integer_labels(scores, label)
        return {
            "correct": jnp.sum(mask_finite & (jnp.argmax(scores, axis=-1) == label)),
            "correct_top5": jnp.sum(mask_finite & (ahead < 5)),
            "examples": jnp.sum(mask),
            "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
        }

    def _batch_statistics(self, variables, batch, precision):
        # From zero statistics, a training pass yields (1 - momentum) times the batch's statistics.
        zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
        _, updated = self._model.apply(
            {**variables, "batch_stats": zeros},
            training_images(batch, self._config),
            train=True,
            precision=precision,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        share = 1 - self._model.bn_momentum
        return jax.tree.map(lambda leaf: leaf / share, updated.get("batch_stats", {}))
