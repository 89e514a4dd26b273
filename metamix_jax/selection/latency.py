"""Measured latencies of layers: a CSV that --mode=profile writes, or that you measured yourself.

Columns: layer, act_bits, weight_bits, milliseconds (of one image); others are ignored. One row for
every layer at every pair of its widths, and one of layer "rest" without widths for everything else.
"""

import csv
import math
from pathlib import Path

from metamix_jax.errors import UserError, suggestion
from metamix_jax.networks.precision import Bits
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.cost_models import Latencies

REST = "rest"
COLUMNS = ("layer", "act_bits", "weight_bits", "milliseconds")


def read_latencies(path: Path, costs: LayerCosts, source: str) -> Latencies:
    """Returns the latencies of a network's layers.

    Args:
      path: of the CSV.
      costs: the network's layers.
      source: the field that names the file.

    Raises:
      UserError: it cannot be read, a row is invalid, or a layer is unknown or lacks a width.
    """
    name = f"{source}={str(path)!r}"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = set(COLUMNS) - set(reader.fieldnames or ())
            rows = [] if missing else list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name}: cannot be read ({error}); --mode=profile writes one") from error
    if missing:
        raise UserError(f"{name}: no column {min(missing)!r}; expected {', '.join(COLUMNS)}")
    layers: dict[str, dict[Bits, float]] = {path: {} for path in costs}
    rest = 0.0
    for number, row in enumerate(rows, start=2):
        layer = row["layer"]
        if layer != REST and layer not in costs:
            hint = suggestion(layer, [*costs, REST])
            raise UserError(f"{name}, line {number}: no layer {layer!r}; {hint}")
        try:
            milliseconds = float(row["milliseconds"])
            bits = None if layer == REST else Bits(int(row["act_bits"]), int(row["weight_bits"]))
        except (TypeError, ValueError):
            milliseconds = math.nan
        if not 0 <= milliseconds < math.inf:
            raise UserError(f"{name}, line {number}: expected numbers, of milliseconds at least 0")
        if layer == REST:
            rest = milliseconds
        else:
            layers[layer][bits] = milliseconds
    for layer, cost in costs.items():
        for bits in cost.candidates:
            if bits not in layers[layer]:
                raise UserError(
                    f"{name}: no row for {layer} at {bits.act} activation and {bits.weight} weight "
                    "bits; run --mode=profile with these candidates"
                )
    return Latencies(layers, rest)
