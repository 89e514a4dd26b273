"""--mode=cost: what every layer costs, and which budgets can be met; no data, no training."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.config import validate
from metamix_jax.networks import registry
from metamix_jax.report import tables
from metamix_jax.selection import cost, cost_models
from metamix_jax.training import setup
from metamix_jax.workdir.files import make_workdir, write_text_atomic


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Prints costs and reachable budgets, writes cost.csv; returns the RESULT line's content.

    config.budget plays no part, so that a budget can be found before one is given.
    """
    validate(config)
    _, costs = setup.make_model(config)
    make_workdir(workdir)
    table = cost.rows(costs)
    totals = cost.totals(costs) | {"reachable": cost_models.reachable(costs)}
    meanings = {name: unit.meaning for name, unit in cost_models.BUDGET_UNITS.items()}
    print(tables.cost_table(table, totals) + tables.reachable_table(totals["reachable"], meanings))
    write_text_atomic(workdir / "cost.csv", cost.to_csv(table))
    return {"mode": "cost", "model": registry.label(config.model), **totals}
