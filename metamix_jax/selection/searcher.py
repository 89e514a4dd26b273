"""The interface of a searcher; each file in searchers/ defines one."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.fields import Field
from metamix_jax.networks.precision import Bits
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.phases import FINE_TUNING, Row


def _accept(*_: Any) -> None:
    """Accepts anything."""


@dataclasses.dataclass(frozen=True)
class Searcher:
    """A way to choose the bits.

    name: its name in config.search.searcher.
    summary: how it chooses, as a cell of a table.
    phases: rows in order, from phases.py or its own.
    choose: returns the bits of all layers, given the state after its own phases; None: there are
      no bits to choose, and the run ends after full-precision training.
    fields: configuration fields that only this searcher reads.
    exclusive: paths of fields that must be empty with any other searcher.
    check: raises UserError for configurations that it does not support.
    check_network: the same, given (configuration, layers, budget), before anything is compiled.
    compared: whether it is a method of --mode=compare.
    variants: further methods by name, each with the fields in which its configuration differs.
    fit: given (configuration, layers, budget), returns the fields that keep it within a budget
      that it does not look at itself, for --mode=compare.
    """

    name: str
    summary: str
    phases: tuple[Row, ...]
    choose: Callable[[SearchContext], dict[str, Bits]] | None
    fields: tuple[Field, ...] = ()
    exclusive: tuple[str, ...] = ()
    check: Callable[[ConfigDict], None] = _accept
    check_network: Callable[[ConfigDict, LayerCosts, Budget], None] = _accept
    compared: bool = True
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    fit: Callable[[ConfigDict, LayerCosts, Budget], dict[str, Any]] | None = None

    @property
    def trains(self) -> bool:
        """Whether it has phases of its own before the bits are chosen."""
        return any(row not in FINE_TUNING for row in self.phases)

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """Its methods of --mode=compare: name -> the fields in which the configuration differs."""
        if not self.compared:
            return {}
        named = {self.name: {}, **self.variants}
        return {name: {"search.searcher": self.name, **own} for name, own in named.items()}
