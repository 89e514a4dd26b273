"""Any Flax image classifier with its convolutions and products quantized, its code unchanged.

The network is traced; the equations of its jaxpr are evaluated as they stand, except products of an
input with weights (convolutions, dense layers, einsums) and of two inputs (attention). Those are
layers: their operands go through the quantizers of layers.py, whose state is in the collection
`quant` under the path of the module that owns the weights.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import Scope
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.typing import DTypeLike

from metamix_jax.errors import UserError
from metamix_jax.networks import dataflow
from metamix_jax.networks.adapters import Adapter
from metamix_jax.networks.dataflow import Value, called, walk
from metamix_jax.networks.kernels.convolution import convolve
from metamix_jax.networks.kernels.depthwise import depthwise_conv
from metamix_jax.networks.layers import QuantProduct
from metamix_jax.networks.precision import FULL, Precision, QuantSettings

PRODUCTS = ("conv_general_dilated", "dot_general")
LOOPS = ("scan", "while", "cond")
# The largest shift: inputs that fall further below 0 are quantized with a sign.
MOST_SHIFT = 1.0


@dataclasses.dataclass(frozen=True)
class Site:
    """One product in the traced network.

    layer: name of its layer; several sites may share one.
    weights: which operand holds the weights; None: both depend on the image.
    low: lower bounds of the operands.
    high: upper bounds.
    macs: multiply-accumulates for the traced batch.
    source: line of the network's code.
    """

    layer: str
    weights: int | None
    low: tuple[float, float]
    high: tuple[float, float]
    macs: int
    source: str


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of the network, found by tracing.

    signed, shift: of the quantizer of its input; of a product of two inputs, of both in turn.
    first, last: whether no other layer comes before it, or after it.
    macs, act_elements: per image, over all its sites.
    """

    signed: tuple[bool, ...]
    shift: tuple[float, ...]
    first: bool
    last: bool
    macs: int
    act_elements: int


@dataclasses.dataclass(frozen=True)
class Trace:
    """A traced network: its jaxpr, and what is known of its products, in the order they run."""

    jaxpr: ClosedJaxpr
    sites: tuple[Site, ...]
    last: frozenset[str]  # layers without another one after them
    first: frozenset[str]
    outputs: Any  # structure of the outputs


class InterceptedNetwork(nn.Module):
    """A network whose products run at a `Precision`.

    Variables: the network's own `params` and `batch_stats`, at their own paths, and `quant`.

    network: the network as a function of its variables.
    num_classes: scores that it must return.
    settings: of the quantizers.
    """

    network: Adapter
    num_classes: int
    settings: QuantSettings

    @property
    def bn_momentum(self) -> float:
        """Share of the running statistics that a training step keeps."""
        return self.network.bn_momentum

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, precision: Precision = FULL) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, c]."""
        if self.is_initializing():
            self._init_network(x)
        rng = self.make_rng("dropout") if train and self.has_rng("dropout") else None
        variables = {
            name: dict(self.variables[name])
            for name in ("params", "batch_stats")
            if name in self.variables
        }
        watched = any(map(self.is_mutable_collection, ("intermediates", "perturbations", "errors")))
        plain = precision == FULL and not train and not watched
        if plain and not self.is_initializing():
            return self.network.apply(variables, x, train, rng)[0]
        trace = traced(self.network, variables, x, train, rng)
        layers = layers_of(trace, batch=x.shape[0])
        modules = {name: self._module(name, layer) for name, layer in layers.items()}
        leaves = jax.tree.leaves((variables, x, rng))
        sites = iter(trace.sites)

        def product(eqn: JaxprEqn, operands: list[jax.Array]) -> jax.Array:
            site = next(sites)
            return _product(modules, site, layers, eqn, operands, precision)

        found = evaluate(trace.jaxpr.jaxpr, trace.jaxpr.consts, leaves, product)
        scores, statistics = jax.tree.unflatten(trace.outputs, found)
        if train and not self.is_initializing() and self.is_mutable_collection("batch_stats"):
            for name, tree in statistics.items():
                self.put_variable("batch_stats", name, tree)
        return scores

    def _init_network(self, x: jax.Array) -> None:
        variables = self.network.init(self.make_rng("params"), x)
        for collection, tree in variables.items():
            for name, value in tree.items():
                self.put_variable(collection, name, value)

    def _module(self, name: str, layer: Layer) -> QuantProduct:
        """Returns the layer's quantizers, with their variables in the scope of its path."""
        scope: Scope = self.scope
        for part in name.split("/"):
            scope = scope.push(part, reuse=True)
        settings = self.settings
        if layer.first:
            settings = settings.stem()
        elif layer.last:
            settings = settings.ends()
        return QuantProduct(
            settings=settings,
            signed=layer.signed[0],
            shift=layer.shift[0],
            macs=layer.macs,
            act_elements=layer.act_elements,
            parent=scope,
        )


def traced(
    network: Adapter, variables: Mapping[str, Any], x: jax.Array, train: bool, rng: Any
) -> Trace:
    """Returns the traced network; raises UserError for layers that cannot be quantized."""

    def flat(*leaves: jax.Array) -> Any:
        return network.apply(*jax.tree.unflatten(structure, leaves)[:2], train,
                             jax.tree.unflatten(structure, leaves)[2])  # fmt: skip

    leaves, structure = jax.tree.flatten((dict(variables), x, rng))
    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    paths = jax.tree_util.tree_leaves_with_path((dict(variables), x, rng))
    arguments = [_argument(path) for path, _ in paths]
    finder = _Finder(x.shape[0])
    outputs = walk(closed.jaxpr, closed.consts, arguments, finder.visit)
    scores = outputs[0]
    if not finder.sites:
        raise UserError("the network has no convolutions or products to quantize")
    return Trace(
        closed, finder.named(), last=finder.names_of(scores.below),
        first=finder.names_of(frozenset(finder.first)), outputs=jax.tree.structure(shapes),
    )  # fmt: skip


def _argument(path: tuple[Any, ...]) -> Value:
    """Returns what is known of an input of the traced function, by its place in the arguments."""
    number, *keys = path
    if number.idx == 1:
        return Value(image=True)
    if number.idx == 0 and keys[0].key == "params":
        return Value(weights=frozenset({"/".join(_text(key) for key in keys[1:])}))
    return Value()


def _text(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


class _Finder:
    """Collects the products of a network while its jaxpr is walked."""

    def __init__(self, batch: int):
        self.batch = batch
        self.first: set[str] = set()
        self.sites: list[tuple[tuple[str, ...], str, Site]] = []

    def visit(self, eqn: JaxprEqn, operands: list[Value]) -> list[Value] | None:
        """Records a product; returns what is known of its result, None of other equations."""
        name = eqn.primitive.name
        if name in LOOPS and any(value.image for value in operands) and _has_products(eqn):
            raise UserError(
                f"{_module_of(eqn)}: layers inside {name} (such as nn.scan) cannot be quantized one "
                f"by one ({_source(eqn)}); write the loop in Python"
            )
        if name not in PRODUCTS or not any(value.image for value in operands[:2]):
            return None
        image = [value.image for value in operands[:2]]
        weights = None if all(image) else image.index(False)
        if weights is not None and not operands[weights].weights:
            return None  # with constants, such as a fixed blur: not quantized
        leaves = tuple(sorted(operands[weights].weights)) if weights is not None else ()
        key = "&".join(leaves) or f"{_module_of(eqn)}:{len(self.sites)}"
        if not operands[0].below | operands[1].below:
            self.first.add(key)
        bounds = [value.bounds for value in operands[:2]]
        site = Site(
            layer=key, weights=weights, low=(bounds[0][0], bounds[1][0]),
            high=(bounds[0][1], bounds[1][1]), macs=_macs(eqn) // self.batch, source=_source(eqn),
        )  # fmt: skip
        self.sites.append((leaves, _module_of(eqn), site))
        return [Value(image=True, below=frozenset({key}))]

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """The layers' names by their keys: the module's path, with more where that is not unique."""
        wanted = {}
        for leaves, module, site in self.sites:
            owner = leaves[0].rpartition("/")[0] if leaves else module
            wanted[site.layer] = owner or (leaves[0] if leaves else "product")
        counts = collections.Counter(wanted.values())
        names, numbers = {}, collections.Counter()
        for leaves, _, site in self.sites:
            key, name = site.layer, wanted[site.layer]
            if key in names:
                continue
            if counts[name] > 1:
                numbers[name] += 1
                name = leaves[0] if leaves else f"{name}/product{numbers[name]}"
            names[key] = name
        return names

    def named(self) -> tuple[Site, ...]:
        """Returns the sites with their layers' names."""
        return tuple(
            dataclasses.replace(site, layer=self.names[site.layer]) for _, _, site in self.sites
        )

    def names_of(self, keys: frozenset[str]) -> frozenset[str]:
        """Returns the names of layers."""
        return frozenset(self.names[key] for key in keys)


def _has_products(eqn: JaxprEqn) -> bool:
    inner = [value for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
    ) if isinstance(value, ClosedJaxpr | Jaxpr)]  # fmt: skip
    jaxprs = [getattr(value, "jaxpr", value) for value in inner]
    return any(e.primitive.name in PRODUCTS or _has_products(e) for j in jaxprs for e in j.eqns)


def _module_of(eqn: JaxprEqn) -> str:
    """Returns the path of the Flax module that an equation comes from, as far as it is known."""
    stack = str(eqn.source_info.name_stack)
    return stack.partition("/")[2]  # without the network's own name


def _source(eqn: JaxprEqn) -> str:
    frame = jax._src.source_info_util.user_frame(eqn.source_info.traceback)
    return f"{frame.file_name}:{frame.start_line}" if frame else "unknown line"


def _macs(eqn: JaxprEqn) -> int:
    left, right = (v.aval.shape for v in eqn.invars[:2])
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return out * math.prod(left[axis] for axis in contracted)
    features = right[eqn.params["dimension_numbers"].rhs_spec[0]]
    return out * (math.prod(right) // features)


def layers_of(trace: Trace, batch: int) -> dict[str, Layer]:
    """Returns the layers of a traced network, in the order they run."""
    sites: dict[str, list[Site]] = {}
    for site in trace.sites:
        sites.setdefault(site.layer, []).append(site)
    ...
