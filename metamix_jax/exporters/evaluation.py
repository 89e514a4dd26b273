"""Accuracy of an exported network, run by the NumPy executor."""

from collections.abc import Callable
from typing import Any

import numpy as np

from metamix_jax.data.splits import Split
from metamix_jax.exporters import executor
from metamix_jax.exporters.graph import Graph, normalise

BATCH = 50  # images per call of the executor


def evaluate_graph(
    graph: Graph,
    split: Split,
    examples: int,
    reference: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Returns `evaluate` of a network in the NumPy executor."""

    def scores(pixels: np.ndarray) -> np.ndarray:
        return executor.run(graph, normalise(pixels, graph))

    return evaluate(scores, split, examples, reference)


def evaluate(
    scores: Callable[[np.ndarray], np.ndarray],
    split: Split,
    examples: int,
    reference: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Returns top1 and top5 in percent, and counts: correct, correct_top5, examples.

    Args:
      scores: maps uint8 pixels [n, h, w, c] to class scores [n, num_classes].
      split: labelled images.
      examples: how many of them, from the first; 0 = all.
      reference: maps pixels to predicted classes [n]; adds the counts `reference_correct` and
        `differing` (predictions that differ from those of `scores`).
    """
    count = min(examples or len(split), len(split))
    totals = {"correct": 0, "correct_top5": 0, "examples": count}
    if reference is not None:
        totals |= {"reference_correct": 0, "differing": 0}
    for start in range(0, count, BATCH):
        pixels, labels = split.gather(np.arange(start, min(start + BATCH, count)))
        found = scores(pixels)
        predicted = found.argmax(axis=-1)
        own = np.take_along_axis(found, labels[:, None], axis=-1)
        totals["correct"] += int(np.sum(predicted == labels))
        totals["correct_top5"] += int(np.sum((found > own).sum(axis=-1) < 5))
        if reference is not None:
            expected = np.asarray(reference(pixels))
            totals["reference_correct"] += int(np.sum(expected == labels))
            totals["differing"] += int(np.sum(expected != predicted))
    top1, top5 = (100 * totals[name] / count for name in ("correct", "correct_top5"))
    return {"top1": top1, "top5": top5, **totals}
