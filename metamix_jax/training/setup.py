"""The components of a run, built and checked before anything is compiled or written."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from metamix_jax.config import validate
from metamix_jax.data import batching, datasets
from metamix_jax.networks import registry
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.runtime import sharding
from metamix_jax.selection import cost, knapsack, phases
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.checks import check_searcher
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.limits import budget_of
from metamix_jax.selection.searchers import SEARCHERS
from metamix_jax.training.schedule import Span, make_spans
from metamix_jax.training.step.state import TrainState, enter_phase, further_searches


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, the costs of its layers, and its budgets."""

    model: nn.Module
    label: str
    image_shape: tuple[int, int, int]
    costs: LayerCosts
    budget: Budget | None  # None if no bits are chosen any more
    further_budgets: Mapping[str, Budget]  # searched alongside, by the keys of their states

    @property
    def budget_gbops(self) -> float | None:
        """The budget in GBOPs; see `knapsack.most_gbops`."""
        return self.budget and knapsack.most_gbops(self.costs, self.budget)


def make_network(config: ConfigDict, model: Any = None, *, searches: bool = True) -> Network:
    """Builds the network and its budget without data or computation.

    Args:
      config: of the run.
      model: the Linen or NNX module itself, where a Python program hands it over.
      searches: whether bits will be chosen; what only reads a policy needs no budget, nor the files
        that one may depend on.

    Raises:
      UserError: invalid configuration or a budget that cannot be met.
    """
    validate(config)
    check_searcher(config)
    model, costs = make_model(config, model)
    searcher = SEARCHERS[config.search.searcher]
    budget, further = None, further_searches(config) if searches else {}
    if searches and searcher.choose is not None:
        budget = make_budget(config, model, costs)
        searcher.check_network(config, costs, budget)
    further_budgets = {
        key: make_budget(config, model, costs, value) for key, value in further.items()
    }
    label = registry.label(config.model)
    return Network(model, label, image_shape(config.data), costs, budget, further_budgets)


def make_model(config: ConfigDict, given: Any = None) -> tuple[nn.Module, LayerCosts]:
    """Returns the network selected by config.model, and the costs of its layers."""
    options = config.quant
    settings = QuantSettings(
        act_bits=tuple(options.act_bits),
        weight_bits=tuple(options.weight_bits),
        first_last_bits=options.first_last_bits,
        image_bits=options.image_bits,
        init_rule=options.init_rule,
        positive_step=options.positive_step,
        compute_dtype=config.compute_dtype,
        rules=tuple(options.rules),
    )
    shape = image_shape(config.data)
    model = registry.make(
        config.model, config.data.num_classes, settings, image_shape=shape, model=given
    )
    return model, cost.layer_costs(model, shape)


def make_budget(
    config: ConfigDict, model: nn.Module, costs: LayerCosts, value: float | None = None
) -> Budget:
    """Returns the budget of `limits.budget_of`, for the network of `make_model`."""
    moments = functools.partial(cost.live_activations, model, image_shape(config.data))
    return budget_of(costs, config.budget, value, moments=moments)


def image_shape(config_data: ConfigDict) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the images."""
    return (config_data.image_size, config_data.image_size, config_data.channels)


def make_schedule(config: ConfigDict, train_examples: int) -> tuple[Span, ...]:
    """Returns all phases of the run in order."""
    rows = (phases.full_precision, *SEARCHERS[config.search.searcher].phases)
    return make_spans([row(config) for row in rows], train_examples / config.batch_size)


def abstract_variables(network: Network) -> dict[str, Any]:
    """Returns the shapes of params, batch_stats and quant."""
    return jax.eval_shape(lambda: _init_variables(network, seed=0))


def init_state(
    config: ConfigDict, network: Network, weights: Mapping[str, Any] | None = None
) -> TrainState:
    """Returns the state before the first step.

    Args:
      config: its seed is used.
      network: the network to initialize.
      weights: params and batch_stats to start from; None for random ones.
    """
    given = {} if weights is None else {key: weights[key] for key in ("params", "batch_stats")}

    def missing() -> dict[str, Any]:  # the given collections are not compiled at all
        variables = _init_variables(network, config.seed)
        return {name: tree for name, tree in variables.items() if name not in given}

    # It runs once, so optimizing it would take longer than it could save.
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
        # An array; with a Python int, the first step would be compiled twice.
        step=jnp.int32(0),
        rng=jax.random.fold_in(jax.random.key(config.seed), 2),
        **variables,
    )


def _init_variables(network: Network, seed: int) -> dict[str, Any]:
    key = jax.random.key(seed)
    keys = {"params": jax.random.fold_in(key, 0), "quant": jax.random.fold_in(key, 1)}
    variables = network.model.init(keys, jnp.zeros((1, *network.image_shape)))
    # A network without batch norm has no statistics.
    return {name: variables.get(name, {}) for name in ("params", "batch_stats", "quant")}


def load_dataset(
    config: ConfigDict, mesh: Mesh, given: tuple[Any, Any] | None = None
) -> datasets.Dataset:
    """Returns the data set after checking that batches divide over the devices."""
    sharding.check_batch_size(config.batch_size, mesh)
    return datasets.load(config.data, given)


def train_batches(
    config: ConfigDict, dataset: datasets.Dataset, mesh: Mesh, start: int, stop: int
) -> Iterator[dict[str, jax.Array]]:
    """Yields the global batches of steps start to stop - 1, sharded over the devices."""
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
