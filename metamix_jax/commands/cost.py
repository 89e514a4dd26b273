"""--mode=cost: the cost of every layer; no data, no training."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.report import tables
from metamix_jax.selection import cost
from metamix_jax.training import setup
from metamix_jax.workdir.files import write_text_atomic


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Prints the cost of every layer and writes cost.csv; returns the RESULT line's content."""
    network = setup.make_network(config)
    table, totals = cost.rows(network.costs), cost.totals(network.costs)
    print(tables.cost_table(table, totals))
    workdir.mkdir(parents=True, exist_ok=True)
    write_text_atomic(workdir / "cost.csv", cost.to_csv(table))
    return {"mode": "cost", "model": network.label, **totals}
