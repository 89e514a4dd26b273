"""--mode=cost: what every layer costs, and which budgets can be met; no data, no training."""

import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.config import validate
from metamix_jax.exporters.build import obstacle
from metamix_jax.networks import own, registry
from metamix_jax.report import tables
from metamix_jax.runtime import distributed
from metamix_jax.selection import cost, cost_models
from metamix_jax.selection.limits import load_latencies
from metamix_jax.training import setup
from metamix_jax.training.given import Given
from metamix_jax.workdir.files import make_workdir, write_text_atomic


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Prints costs and reachable budgets, writes cost.csv; returns the RESULT line's content.

    config.budget plays no part, so that a budget can be found before one is given.
    """
    validate(config)
    model, costs = setup.make_model(config)
    make_workdir(workdir)
    table = cost.rows(costs)
    totals = cost.totals(costs) | {
        "reachable": cost_models.reachable(
            costs,
            load_latencies(costs, config.budget),
            cost.live_activations(model, setup.image_shape(config.data)),
        )
    }
    meanings = {name: unit.meaning for name, unit in cost_models.BUDGET_UNITS.items()}
    meanings[cost_models.PEAK] = f"{cost_models.PEAK_MEANING} (as a limit)"
    print(tables.cost_table(table, totals) + tables.reachable_table(totals["reachable"], meanings))
    if reason := obstacle(model, costs, setup.image_shape(config.data)):
        print(f"not exportable: {reason}")
    write_text_atomic(workdir / "cost.csv", cost.to_csv(table))
    facts = {"model": registry.label(config.model), "exportable": not reason}
    return {"mode": "cost", **facts, **totals}


def warn_unless_exportable(config: ConfigDict, given: Given | None) -> None:
    """Logs why a network that is about to be trained cannot be exported, if that is so."""
    given = given or Given()
    config = given.named(config)
    if not own.is_own(config.model.name) or not distributed.is_first():
        return  # of the zoo's it is known
    validate(config)
    model, costs = setup.make_model(config, given.model)
    if reason := obstacle(model, costs, setup.image_shape(config.data)):
        logging.warning("%s; it can be trained and evaluated", reason)
