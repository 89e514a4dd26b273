"""Networks of Linen and of NNX as the same pair of pure functions."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from flax import linen as nn
from flax import nnx

from metamix_jax.errors import UserError

TRAIN_FLAGS = {"train": True, "training": True, "is_training": True, "deterministic": False,
               "use_running_average": False}  # fmt: skip
_NO_BATCH_NORM = 0.9  # any value: there are no statistics

Variables = dict[str, Any]  # params, and batch_stats where there is batch norm


class Adapter(Protocol):
    """A network as a function of its variables.

    label: name to show.
    """

    label: str

    def init(self, rng: jax.Array, x: jax.Array) -> Variables:
        """Returns initial variables for images [n, h, w, c]."""

    def apply(
        self, variables: Variables, x: jax.Array, train: bool, rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the scores and, in training, the updated batch_stats; `rng` is for dropout."""

    def momentum(self, x: jax.ShapeDtypeStruct) -> float:
        """Returns batch norm's momentum, one for all; raises UserError for several."""


@dataclasses.dataclass(frozen=True, eq=False)
class LinenAdapter:
    """A Linen module whose call takes the images and, if any, one of TRAIN_FLAGS."""

    module: nn.Module

    @property
    def label(self) -> str:
        """The module's class."""
        return type(self.module).__name__

    def _flags(self, train: bool) -> dict[str, bool]:
        return _flags(type(self.module).__call__, train)

    def init(self, rng: jax.Array, x: jax.Array) -> Variables:
        """See `Adapter`."""
        variables = self.module.init(rng, x, **self._flags(False))
        extra = set(variables) - {"params", "batch_stats"}
        if extra:
            raise UserError(
                f"{self.label}: has variables of kind {', '.join(sorted(extra))}; only params and "
                "batch_stats are supported"
            )
        return variables

    def apply(
        self, variables: Variables, x: jax.Array, train: bool, rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """See `Adapter`."""
        rngs = {} if rng is None else {"dropout": rng}
        if not train:
            return self.module.apply(variables, x, rngs=rngs, **self._flags(False)), {}
        scores, updated = self.module.apply(
            variables, x, rngs=rngs, mutable=["batch_stats"], **self._flags(True)
        )
        return scores, dict(updated.get("batch_stats", {}))

    def momentum(self, x: jax.ShapeDtypeStruct) -> float:
        """See `Adapter`."""
        found = set()

        def record(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            if isinstance(context.module, nn.BatchNorm):
                found.add(context.module.momentum)
            return call(*args, **kwargs)

        with nn.intercept_methods(record):
            jax.eval_shape(lambda x: self.init(jax.random.key(0), x), x)
        return _only(found, self.label)


@dataclasses.dataclass(frozen=True, eq=False)
class NnxAdapter:
    """An NNX module, made by `make(rngs=...)`."""

    make: Callable[..., nnx.Module]
    label: str

    def init(self, rng: jax.Array, x: jax.Array) -> Variables:
        """See `Adapter`."""
        _, params, statistics, _ = _split(self._made(rng))
        variables = {"params": _pure(params), "batch_stats": _pure(statistics)}
        return {name: tree for name, tree in variables.items() if tree}

    def apply(
        self, variables: Variables, x: jax.Array, train: bool, rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """See `Adapter`."""
        # Its variables are replaced; only the structure and the random streams are kept.
        module = self._made(jax.random.key(0) if rng is None else rng)
        module.train() if train else module.eval()
        graph, params, statistics, rest = _split(module)
        nnx.replace_by_pure_dict(params, _with_numbers(variables["params"]))
        if variables.get("batch_stats"):
            nnx.replace_by_pure_dict(statistics, _with_numbers(variables["batch_stats"]))
        module = nnx.merge(graph, params, statistics, rest)
        scores = module(x, **_flags(type(module).__call__, train))
        return scores, _pure(_split(module)[2]) if train else {}

    def momentum(self, x: jax.ShapeDtypeStruct) -> float:
        """See `Adapter`."""
        module = nnx.eval_shape(lambda: self._made(jax.random.key(0)))
        norms = (value for _, value in nnx.iter_modules(module))
        return _only({n.momentum for n in norms if isinstance(n, nnx.BatchNorm)}, self.label)

    def _made(self, rng: jax.Array) -> nnx.Module:
        return self.make(rngs=nnx.Rngs(rng))


class NnxInstance(NnxAdapter):
    """An NNX module that exists already; its own variables are the initial ones."""

    def __init__(self, module: nnx.Module):
        super().__init__(functools.partial(_cloned, module), type(module).__name__)
        object.__setattr__(self, "_module", module)

    def variables(self) -> Variables:
        """Returns the module's params and batch_stats."""
        _, params, statistics, _ = _split(self._module)
        return {"params": _pure(params), "batch_stats": _pure(statistics)}


def _cloned(module: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a copy of a module whose random streams start from those of `rngs`."""
    graph, keys, rest = nnx.split(module, nnx.RngKey, ...)
    key = rngs.dropout()
    leaves, structure = jax.tree.flatten(keys)
    fresh = [jax.random.split(jax.random.fold_in(key, i), k.shape) for i, k in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(structure, fresh), rest, copy=True)


def _split(module: nnx.Module) -> tuple[Any, nnx.State, nnx.State, nnx.State]:
    return nnx.split(module, nnx.Param, nnx.BatchStat, ...)


def _pure(state: nnx.State) -> dict[str, Any]:
    return _with_names(nnx.to_pure_dict(state))


def _with_names(tree: Any) -> Any:
    """Returns a tree with texts in place of a list's numbers, as in paths."""
    if not isinstance(tree, Mapping):
        return tree
    return {str(key): _with_names(value) for key, value in tree.items()}


def _with_numbers(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {int(key) if key.isdigit() else key: _with_numbers(value) for key, value in tree.items()}


def _flags(call: Callable, train: bool) -> dict[str, bool]:
    """Returns the flags of a network's call that say whether it trains."""
    known = inspect.signature(call).parameters
    return {name: train == value for name, value in TRAIN_FLAGS.items() if name in known}


def _only(found: set[float], label: str) -> float:
    if len(found) > 1:
        raise UserError(
            f"{label}: batch norm with momentum {', '.join(map(str, sorted(found)))}; expected the "
            "same everywhere"
        )
    return next(iter(found), _NO_BATCH_NORM)
