"""What a Python program hands over itself, in place of names in the configuration."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from metamix_jax.data import sources
from metamix_jax.errors import UserError
from metamix_jax.networks import own


@dataclasses.dataclass(frozen=True)
class Given:
    """A network, weights and data, each None where the configuration names it.

    model: a Linen or NNX module.
    variables: `params` and, with batch norm, `batch_stats` to start from; of an NNX module, its own
      are the default.
    data: sources to train and to evaluate on (data/sources.py).
    """

    model: Any = None
    variables: Mapping[str, Any] | None = None
    data: tuple[Any, Any] | None = None

    def named(self, config: ConfigDict) -> ConfigDict:
        """Returns the configuration with the names that stand for what is given."""
        config = ConfigDict(config.to_dict())
        if self.model is not None:
            config.model = ConfigDict({"name": own.given_name(self.model)})
        if self.data is not None:
            config.data.name = sources.NAME
        return config.lock()

    def weights(self, shapes: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the variables to start from; raises UserError where their shapes do not fit.

        Args:
          shapes: of the network's params and batch_stats.
        """
        variables = self.variables
        if variables is None:
            variables = own.variables_of(self.model)
        if variables is None:
            return None
        found = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
        wanted, had = (_leaves({key: tree[key] for key in found}) for tree in (shapes, found))
        for path in sorted(wanted.keys() | had.keys()):
            if wanted.get(path) != had.get(path):
                raise UserError(
                    f"variables{path}: {had.get(path, 'missing')}; the network has "
                    f"{wanted.get(path, 'no such array')}"
                )
        return found


def _leaves(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}
