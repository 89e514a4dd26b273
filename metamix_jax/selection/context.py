"""What a searcher knows when it chooses the bits."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from metamix_jax.selection.budget import Budget
from metamix_jax.selection.cost import LayerCosts


@dataclasses.dataclass(frozen=True)
class SearchContext:
    """A network after the searcher's own phases, and the budget."""

    model: nn.Module
    costs: LayerCosts
    budget: Budget
    config: ConfigDict
    variables: Mapping[str, Any]  # params, batch_stats and quant
    logits: Mapping[str, np.ndarray]  # searched layer -> [branches]
    # Yields the first `count` training batches: augmented, normalized images, and labels.
    batches: Callable[[int], Iterator[tuple[jax.Array, jax.Array]]]
