"""The budget of a run: config.budget.value, and with it config.budget.limits.

Limits are texts UNIT=VALUE, such as ("mebibytes=0.25", "milliseconds=3.5"); a policy keeps all.
That on the peak of activations is one on the sum at each of several moments.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.fields import is_finite
from metamix_jax.networks.lifetimes import Moment
from metamix_jax.selection import knapsack
from metamix_jax.selection.budget import TOLERANCE, Budget, make_budget
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.cost_models import (
    ACTIVATIONS,
    BUDGET_UNITS,
    PEAK,
    CostModel,
    Latencies,
    activation_models,
    peak_range,
)
from metamix_jax.selection.latency import read_latencies

UNITS = (*BUDGET_UNITS, PEAK)
EXPECTED = f"limits UNIT=VALUE, each unit once, of {', '.join(UNITS)}; values above 0"


def parse(text: str) -> tuple[str, float]:
    """Returns unit and value of a limit; raises ValueError if it is none."""
    unit, _, value = text.partition("=")
    number = float(value)
    if unit not in UNITS or not is_finite(number) or number <= 0:
        raise ValueError(text)
    return unit, number


def are_limits(texts: tuple[str, ...]) -> bool:
    """Returns whether all texts are limits, of different units."""
    try:
        units = [parse(text)[0] for text in texts]
    except (AttributeError, ValueError):
        return False
    return len(set(units)) == len(units)


def units_of(config_budget: ConfigDict) -> list[str]:
    """Returns the units of the budget and of its limits."""
    return [config_budget.unit, *(parse(text)[0] for text in config_budget.limits)]


def load_latencies(costs: LayerCosts, config_budget: ConfigDict) -> Latencies | None:
    """Returns the latencies of config.budget.latencies; None if the field is empty."""
    if not config_budget.latencies:
        return None
    path = Path(config_budget.latencies).expanduser()
    return read_latencies(path, costs, "config.budget.latencies")


def budget_of(
    costs: LayerCosts,
    config_budget: ConfigDict,
    value: float | None = None,
    *,
    moments: Callable[[], Sequence[Moment]],
) -> Budget:
    """Returns the budget with all of its limits.

    Args:
      costs: the network's layers.
      config_budget: config.budget.
      value: in place of config.budget.value.
      moments: returns what the network keeps while each layer runs; called if a limit needs it.

    Raises:
      UserError: a limit that no policy keeps, or limits that none keeps together.
    """
    latencies = load_latencies(costs, config_budget)
    value = config_budget.value if value is None else value
    budget = make_budget(costs, value, config_budget.unit, latencies)
    further = []
    for unit, most in map(parse, config_budget.limits):
        if unit == PEAK:
            further += _peak(activation_models(costs, moments()), most)
        else:
            further.append(make_budget(costs, most, unit, latencies, "config.budget.limits"))
    budget = Budget(budget.cost_model, budget.limit, tuple(further))
    if further and _least(budget) is None:
        raise UserError(_infeasible(budget))
    return budget


def _peak(models: Sequence[CostModel], most: float) -> list[Budget]:
    """Returns the budgets that together limit the peak."""
    least, greatest = peak_range(models)
    if least > most * (1 + TOLERANCE):
        raise UserError(
            f"config.budget.limits={PEAK}={most:g}: this network reaches {least:.6g} to "
            f"{greatest:.6g} MiB with its candidate bit-widths; nearest feasible value: "
            f"{least:.12g}"
        )
    return [Budget(model, most) for model in models]


def _infeasible(budget: Budget) -> str:
    every = (budget, *budget.further)
    reachable = []
    for each in every:
        if each.cost_model.name == ACTIVATIONS:
            continue  # one of several moments, whose least says nothing
        free = Budget(each.cost_model, each.cost_model.most, _others(every, each))
        least = _least(free)
        if least is not None:
            reachable.append(f"{least:.6g} {each.cost_model.unit}")
    hint = f"; with the others kept, the least is {' or '.join(reachable)}" if reachable else ""
    texts = dict.fromkeys(map(str, every))
    return f"config.budget.limits: no policy keeps {' and '.join(texts)}{hint}"


def _others(every: tuple[Budget, ...], each: Budget) -> tuple[Budget, ...]:
    return tuple(Budget(o.cost_model, o.limit) for o in every if o is not each)


def _least(budget: Budget) -> float | None:
    """Returns the least cost of a policy within a budget and its limits; None if there is none."""
    table = budget.cost_model.branch_costs
    worth = {path: [-cost for cost in row] for path, row in table.items()}
    try:
        choice = knapsack.maximise(worth, table, budget.room, budget.further_rooms)
    except ValueError:
        return None
    return budget.cost_model.cost_of(choice)
