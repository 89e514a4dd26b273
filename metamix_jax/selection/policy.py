"""The policy: the bits of each layer; every searcher produces one, exporters read it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metamix_jax.errors import UserError, suggestion
from metamix_jax.networks.precision import Bits
from metamix_jax.selection import cost as cost_lib
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.cost import LayerBits, LayerCosts
from metamix_jax.workdir.files import read_json, write_json

FORMAT = 1


class ChosenLayer(NamedTuple):
    """A layer of a policy."""

    bits: Bits
    macs: int


@dataclasses.dataclass(frozen=True)
class Policy:
    """The bit-widths of all layers of a network, and how they were chosen.

    model: the network's label.
    image_size: height and width of the images for which MACs and BOPs are counted.
    searcher: the searcher that chose the bits, with `seed`.
    budget_gbops: the budget they were chosen for, see `knapsack.most_gbops`.
    gbops: their cost.
    layers: layer path -> its bits and MACs, in network order.
    """

    model: str
    image_size: int
    searcher: str
    seed: int
    budget_gbops: float
    gbops: float
    layers: Mapping[str, ChosenLayer]

    @property
    def bits(self) -> dict[str, Bits]:
        """The widths of all layers."""
        return {path: layer.bits for path, layer in self.layers.items()}

    def branches(self, costs: LayerCosts) -> dict[str, jax.Array]:
        """Returns the branch index of every searched layer, for `Precision.branches`."""
        return branches(self.bits, costs)

    def cost(self, budget: Budget) -> float:
        """Returns the policy's cost in the unit of `budget`."""
        return budget.cost(self.bits)

    def check(self, costs: LayerCosts, source: str) -> None:
        """Raises UserError unless the layers are those of a network, at candidate widths."""
        for path in self.layers:
            if path not in costs:
                raise UserError(f"{source}: unknown layer {path!r}; {suggestion(path, costs)}")
        for path, cost in costs.items():
            if path not in self.layers:
                raise UserError(f"{source}: layer {path!r} of the network is missing")
            chosen = self.layers[path].bits
            for field, value, allowed in (
                ("act_bits", chosen.act, cost.act_bits),
                ("weight_bits", chosen.weight, cost.weight_bits),
            ):
                if not isinstance(value, int) or value not in allowed:
                    raise UserError(
                        f"{source}: {path}: {field}={value!r}, expected one of {allowed}"
                    )

    def to_json(self) -> dict[str, Any]:
        """Returns the content of policy.json."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        layers = {
            path: {"act_bits": bits.act, "weight_bits": bits.weight, "macs": macs}
            for path, (bits, macs) in self.layers.items()
        }
        return {"format": FORMAT, **facts, "layers": layers}

    @classmethod
    def from_json(cls, content: Any, source: str) -> "Policy":
        """Returns the policy that `to_json` converted to `content`.

        The layers are not validated here; `check` compares them with a network.

        Raises:
          UserError: not a policy of format 1; the message starts with `source`.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{source}: expected a policy of format {FORMAT}")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in content]
        if missing or not isinstance(content["layers"], dict):
            raise UserError(f"{source}: policy lacks {', '.join(missing) or 'a table of layers'}")
        facts = {name: content[name] for name in names}
        layers = {path: _chosen_layer(row) for path, row in content["layers"].items()}
        return cls(**facts | {"layers": layers})


def _chosen_layer(row: Any) -> ChosenLayer:
    row = row if isinstance(row, dict) else {}
    return ChosenLayer(Bits(row.get("act_bits"), row.get("weight_bits")), row.get("macs"))


def make_policy(costs: LayerCosts, bits: LayerBits, **facts: Any) -> Policy:
    """Returns the policy of a network's layers at `bits`.

    Args:
      costs: the network's layers.
      bits: the widths of all layers.
      **facts: model, image_size, searcher, seed, budget_gbops.
    """
    layers = {path: ChosenLayer(bits[path], cost.macs) for path, cost in costs.items()}
    return Policy(gbops=cost_lib.bops(costs, bits) / cost_lib.GIGA, layers=layers, **facts)


def branches(bits: LayerBits, costs: LayerCosts) -> dict[str, jax.Array]:
    """Returns the branch index of every searched layer at `bits`, for `Precision.branches`."""
    return {
        path: jnp.int32(cost.candidates.index(bits[path]))
        for path, cost in costs.items()
        if cost.searched
    }


def write_policy(path: Path, policy: Policy) -> None:
    """Writes policy.json atomically."""
    write_json(path, policy.to_json())


def load_policy(path: Path) -> Policy:
    """Reads the policy.json of any network; raises UserError unless it is of format 1."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable policy file ({error})") from error
    return Policy.from_json(content, source=str(path))


def read_policy(path: Path, costs: LayerCosts) -> Policy:
    """Reads policy.json and checks it against the network.

    Raises:
      UserError: not a policy of format 1, or not of this network.
    """
    policy = load_policy(path)
    policy.check(costs, source=str(path))
    return policy


def policy_of_checkpoint(content: Any, costs: LayerCosts, source: str) -> Policy | None:
    """Returns the policy in a checkpoint's facts; None if no bits were chosen yet.

    Raises:
      UserError: not a policy, or not of this network.
    """
    if content is None:
        return None
    policy = Policy.from_json(content, source)
    policy.check(costs, source)
    return policy
