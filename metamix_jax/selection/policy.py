"""The policy file: which bits each layer runs at, readable by every searcher and exporter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from metamix_jax.errors import UserError, suggestion
from metamix_jax.networks.precision import Bits
from metamix_jax.selection import cost as cost_lib
from metamix_jax.selection.cost import LayerBits, LayerCosts
from metamix_jax.workdir.files import read_json, write_json

FORMAT = 1
_FIELDS = ("model", "image_size", "searcher", "seed", "budget_gbops", "gbops", "layers")


def make_policy(costs: LayerCosts, bits: LayerBits, **facts: Any) -> dict[str, Any]:
    """Returns the policy as the JSON object of policy.json.

    Args:
      costs: the network's layers.
      bits: the widths of all layers.
      **facts: model, image_size, searcher, seed, budget_gbops.
    """
    layers = {
        path: {"act_bits": bits[path].act, "weight_bits": bits[path].weight, "macs": cost.macs}
        for path, cost in costs.items()
    }
    gbops = cost_lib.bops(costs, bits) / cost_lib.GIGA
    return {"format": FORMAT, **facts, "gbops": gbops, "layers": layers}


def write_policy(path: Path, policy: Mapping[str, Any]) -> None:
    """Writes policy.json atomically."""
    write_json(path, policy)


def read_policy(path: Path, costs: LayerCosts) -> dict[str, Any]:
    """Reads policy.json and checks it against the network.

    Raises:
      UserError: not a policy of format 1, or one that does not fit the network.
    """
    policy = load_policy(path)
    check_policy(policy, costs, source=str(path))
    return policy


def load_policy(path: Path) -> dict[str, Any]:
    """Reads policy.json of whatever network; raises UserError if it is none of format 1."""
    try:
        policy = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable policy file ({error})") from error
    _check_form(policy, source=str(path))
    return policy


def _check_form(policy: Any, source: str) -> None:
    if not isinstance(policy, dict) or policy.get("format") != FORMAT:
        raise UserError(f"{source}: expected a policy of format {FORMAT}")
    missing = [field for field in _FIELDS if field not in policy]
    if missing or not isinstance(policy["layers"], dict):
        raise UserError(f"{source}: policy lacks {', '.join(missing) or 'a table of layers'}")


def check_policy(policy: Any, costs: LayerCosts, source: str) -> None:
    """Raises UserError unless `policy` names every layer of the network with possible bits."""
    _check_form(policy, source)
    for path in policy["layers"]:
        if path not in costs:
            raise UserError(f"{source}: unknown layer {path!r}; {suggestion(path, costs)}")
    for path, cost in costs.items():
        if path not in policy["layers"]:
            raise UserError(f"{source}: layer {path!r} of the network is missing")
        row = policy["layers"][path]
        expected = {"act_bits": cost.act_bits, "weight_bits": cost.weight_bits}
        for field, allowed in expected.items():
            value = row.get(field) if isinstance(row, dict) else None
            if not isinstance(value, int) or value not in allowed:
                raise UserError(f"{source}: {path}: {field}={value!r}, expected one of {allowed}")


def layer_bits(policy: Mapping[str, Any]) -> dict[str, Bits]:
    """Returns the widths of all layers."""
    return {
        path: Bits(row["act_bits"], row["weight_bits"]) for path, row in policy["layers"].items()
    }


def branches(bits: LayerBits, costs: LayerCosts) -> dict[str, jax.Array]:
    """Returns the branch index of every searched layer, for `Precision.branches`."""
    return {
        path: jnp.int32(cost.candidates.index(bits[path]))
        for path, cost in costs.items()
        if cost.searched
    }
