"""What a run is made of, built and checked before anything is compiled or written."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from metamix_jax.config import validate
from metamix_jax.data import batching, datasets
from metamix_jax.errors import UserError
from metamix_jax.networks import registry
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.runtime import sharding
from metamix_jax.selection import cost, knapsack, phases
from metamix_jax.selection.budget import Budget, make_budget
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.phases import Span
from metamix_jax.selection.searchers import SEARCHERS
from metamix_jax.selection.searchers.file import read_bits
from metamix_jax.training.step.state import TrainState, enter_phase, further_searches


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and what it costs."""

    model: nn.Module
    label: str
    image_shape: tuple[int, int, int]
    costs: LayerCosts
    budget: Budget | None  # None with searcher "none"
    further_budgets: Mapping[str, Budget]  # searched beside it, by the keys of their states

    @property
    def budget_gbops(self) -> float | None:
        """The budget in GBOPs; see `budget_in_gbops`."""
        return self.budget and self.budget_in_gbops(self.budget)

    def budget_in_gbops(self, budget: Budget) -> float:
        """Returns a budget in GBOPs; for one in another unit, the most GBOPs it admits."""
        if budget.unit == "GBOPs":
            return budget.limit
        gbops = {path: cost.branch_gbops(self.costs[path]) for path in budget.branch_costs}
        room = budget.limit - budget.fixed_cost
        choice = knapsack.maximise(gbops, budget.branch_costs, room)
        bits = {path: self.costs[path].candidates[index] for path, index in choice.items()}
        return cost.bops(self.costs, cost.widest_bits(self.costs) | bits) / cost.GIGA


def make_network(config: ConfigDict) -> Network:
    """Builds the network and its budget without data or computation.

    Raises:
      UserError: invalid configuration or a budget that cannot be met.
    """
    validate(config)
    options = config.quant
    settings = QuantSettings(
        act_bits=tuple(options.act_bits),
        weight_bits=tuple(options.weight_bits),
        first_last_bits=options.first_last_bits,
        image_bits=options.image_bits,
        init_rule=options.init_rule,
        positive_step=options.positive_step,
        compute_dtype=config.compute_dtype,
    )
    model = registry.make(config.model, config.data.num_classes, settings)
    size = config.data.image_size
    image_shape = (size, size, config.data.channels)
    costs = cost.layer_costs(model, image_shape)
    budget = None
    if config.search.searcher != "none":
        budget = make_budget(costs, config.budget)
        if config.search.searcher == "uniform":
            _check_uniform(config, costs, budget)
        elif config.search.searcher == "file":
            read_bits(config.search.policy, costs, budget)
    further_budgets = {
        key: make_budget(costs, ConfigDict({"value": value, "unit": config.budget.unit}))
        for key, value in further_searches(config).items()
    }
    label = registry.label(config.model)
    return Network(model, label, image_shape, costs, budget, further_budgets)


def _check_uniform(config: ConfigDict, costs: LayerCosts, budget: Budget) -> None:
    bits = config.search.uniform_bits
    spent = budget.cost(cost.uniform_bits(costs, bits), costs)
    if spent > budget.limit * (1 + 1e-9):
        raise UserError(
            f"config.search.uniform_bits={bits}: {spent:.6g} {budget.unit}, above the budget of "
            f"{budget.limit:.6g}; raise config.budget.value or take fewer bits"
        )


def make_schedule(config: ConfigDict, train_examples: int) -> tuple[Span, ...]:
    """Returns all phases of the run in order."""
    searcher = SEARCHERS.get(config.search.searcher)
    searcher_phases = searcher.PHASES if searcher else ()
    return phases.make_schedule(config, searcher_phases, train_examples / config.batch_size)


def abstract_variables(network: Network) -> dict[str, Any]:
    """Returns the shapes of params, batch_stats and quant."""
    return jax.eval_shape(lambda: _init_variables(network, seed=0))


def init_state(
    config: ConfigDict, network: Network, weights: Mapping[str, Any] | None = None
) -> TrainState:
    """Returns the state before the first step.

    Args:
      config: seed.
      network: what to initialise.
      weights: params and batch_stats to start from; None: random ones.
    """
    given = {} if weights is None else {key: weights[key] for key in ("params", "batch_stats")}

    def missing() -> dict[str, Any]:  # what is given is not compiled either
        variables = _init_variables(network, config.seed)
        return {name: tree for name, tree in variables.items() if name not in given}

    # It runs once, so that compiling takes longer than what optimization could save.
    make = jax.jit(missing, compiler_options={"xla_backend_optimization_level": 0})
    return _first_state(config, make() | given)


def abstract_state(config: ConfigDict, network: Network, span: Span) -> TrainState:
    """Returns the shapes of the state during a phase."""

    def state() -> TrainState:
        first = _first_state(config, _init_variables(network, config.seed))
        return enter_phase(first, span, config)

    return jax.eval_shape(state)


def _first_state(config: ConfigDict, variables: Mapping[str, Any]) -> TrainState:
    return TrainState(
        # An array, not a Python int, or the first step would be compiled twice.
        step=jnp.int32(0),
        opt_states={},
        rng=jax.random.fold_in(jax.random.key(config.seed), 2),
        **variables,
    )


def _init_variables(network: Network, seed: int) -> dict[str, Any]:
    key = jax.random.key(seed)
    keys = {"params": jax.random.fold_in(key, 0), "quant": jax.random.fold_in(key, 1)}
    variables = network.model.init(keys, jnp.zeros((1, *network.image_shape)))
    return {name: variables[name] for name in ("params", "batch_stats", "quant")}


def load_dataset(config: ConfigDict, mesh: Mesh) -> datasets.Dataset:
    """Returns the data set after checking that batches divide over the devices."""
    sharding.check_batch_size(config.batch_size, mesh)
    return datasets.load(config.data)


def train_batches(
    config: ConfigDict, dataset: datasets.Dataset, mesh: Mesh, start: int, stop: int
) -> Iterator[dict[str, jax.Array]]:
    """Yields the global batches of steps start, ..., stop - 1 on the devices."""
    batches = batching.train_batches(
        dataset.train,
        seed=config.seed,
        batch_size=config.batch_size,
        start=start,
        stop=stop,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return (sharding.shard_batch(batch, mesh) for batch in batches)
