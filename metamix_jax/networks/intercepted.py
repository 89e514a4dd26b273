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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.typing import DTypeLike

from metamix_jax.errors import UserError
from metamix_jax.networks.adapters import Adapter
from metamix_jax.networks.dataflow import Value, called, walk
from metamix_jax.networks.kernels.convolution import convolve
from metamix_jax.networks.kernels.depthwise import depthwise_conv
from metamix_jax.networks.layers import QuantPair, QuantProduct
from metamix_jax.networks.precision import FULL, Precision, QuantSettings

PRODUCTS = ("conv_general_dilated", "dot_general")
LOOPS = ("scan", "while", "cond")
WATCHED = ("intermediates", "perturbations", "errors")  # collections of the layers' probes
# The largest shift: inputs that fall further below 0 are quantized with a sign.
MOST_SHIFT = 1.0
_LIBRARIES = ("/site-packages/", "/dist-packages/", "/metamix_jax/networks/")


@dataclasses.dataclass(frozen=True)
class Site:
    """One product in a traced network: an equation, in the order in which they are evaluated.

    layer: name of its layer; several sites may share one.
    weights: which operand holds the weights; None: both depend on the image.
    """

    layer: str
    weights: int | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a network, found by tracing.

    signed, shift: of the quantizers of its two operands; those of weights do not count.
    first, last: whether no other layer comes before it, or after it.
    macs, act_elements: for the traced batch, over all its sites.
    pair: whether both operands depend on the image.
    source: a line of the network's code.
    """

    signed: tuple[bool, bool]
    shift: tuple[float, float]
    first: bool
    last: bool
    macs: int
    act_elements: int
    pair: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Trace:
    """A traced network.

    jaxpr: of `apply`.
    outputs: structure of its results.
    sites: one entry for each product in the jaxpr, None for those left as they are.
    layers: by name, in the order they run.
    """

    jaxpr: ClosedJaxpr
    outputs: Any
    sites: tuple[Site | None, ...]
    layers: Mapping[str, Layer]


class InterceptedNetwork(nn.Module):
    """A network whose products run at a `Precision`.

    Variables: the network's own `params` and `batch_stats`, at their own paths, and `quant`.

    network: the network as a function of its variables.
    num_classes: scores that it must return.
    settings: of the quantizers.
    bn_momentum: share of the running statistics that a training step keeps.
    """

    network: Adapter
    num_classes: int
    settings: QuantSettings
    bn_momentum: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, precision: Precision = FULL) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, c]."""
        if self.is_initializing():
            # The root's own key, so that the variables are those of the network's own `init`.
            for collection, tree in self.network.init(self.scope.rngs["params"].rng, x).items():
                for name, value in tree.items():
                    self.put_variable(collection, name, value)
        rng = self.make_rng("dropout") if train and self.has_rng("dropout") else None
        variables = {
            name: dict(self.variables[name])
            for name in ("params", "batch_stats")
            if name in self.variables
        }
        watched = any(map(self.is_mutable_collection, WATCHED)) or "perturbations" in self.variables
        if precision == FULL and not (train or watched or self.is_initializing()):
            return self.network.apply(variables, x, train, rng)[0]
        trace = traced(self.network, variables, x, train, rng)
        modules = {name: self._module(name, layer) for name, layer in trace.layers.items()}
        sites = iter(trace.sites)

        def product(eqn: JaxprEqn, operands: list[jax.Array]) -> jax.Array:
            site = next(sites)
            if site is None:
                return bind(eqn, operands)[0]
            return _quantized(modules[site.layer], site, eqn, operands, precision)

        leaves = jax.tree.leaves((variables, x, rng))
        found = evaluate(trace.jaxpr.jaxpr, trace.jaxpr.consts, leaves, product)
        scores, statistics = jax.tree.unflatten(trace.outputs, found)
        if train and not self.is_initializing() and self.is_mutable_collection("batch_stats"):
            for name, tree in statistics.items():
                self.put_variable("batch_stats", name, tree)
        return scores

    def _module(self, name: str, layer: Layer) -> QuantProduct:
        """Returns the layer's quantizers, with their variables in the scope of its path."""
        scope = self.scope
        for part in name.split("/"):
            scope = scope.push(part, reuse=True)
        settings = self.settings
        if layer.first:
            settings = settings.stem()
        elif layer.last:
            settings = settings.ends()
        facts = {"macs": layer.macs, "act_elements": layer.act_elements}
        if layer.pair:
            settings = dataclasses.replace(settings, weight_bits=(settings.first_last_bits,))
            facts |= {"other_signed": layer.signed[1], "other_shift": layer.shift[1]}
        kind = QuantPair if layer.pair else QuantProduct
        return kind(
            0, settings, signed=layer.signed[0], shift=layer.shift[0], parent=scope, **facts
        )


def _quantized(
    module: QuantProduct,
    site: Site,
    eqn: JaxprEqn,
    operands: list[jax.Array],
    precision: Precision,
) -> jax.Array:
    """Returns a product of quantized operands; weights are given with their features last."""
    second = 1 if site.weights is None else site.weights
    there, back = _features_last(eqn, second) if site.weights is not None else (_same, _same)
    own = _fast_form(eqn)

    def multiply(
        inputs: jax.Array, kernel: jax.Array, preferred_element_type: DTypeLike | None = None
    ) -> jax.Array:
        pair = [inputs, back(kernel)] if second == 1 else [back(kernel), inputs]
        if own is not None and preferred_element_type is None:
            return own(*pair)
        params = dict(eqn.params)
        if preferred_element_type is not None:
            params["preferred_element_type"] = preferred_element_type
        return eqn.primitive.bind(*pair, **params)

    return module(operands[1 - second], there(operands[second]), precision, multiply)


def _same(x: jax.Array) -> jax.Array:
    return x


def _features_last(
    eqn: JaxprEqn, weights: int
) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """Returns a map of a product's weights to [..., features], and its inverse."""
    shape = eqn.invars[weights].aval.shape
    if eqn.primitive.name == "conv_general_dilated":
        own = [eqn.params["dimension_numbers"].rhs_spec[0]]
    else:
        contracted, batch = (pair[weights] for pair in eqn.params["dimension_numbers"])
        own = [axis for axis in range(len(shape)) if axis not in (*contracted, *batch)]
    others = [axis for axis in range(len(shape)) if axis not in own]
    order = (*others, *own)
    if order == tuple(range(len(shape))) and len(own) == 1:
        return _same, _same
    moved = [shape[axis] for axis in order]
    inverse = [order.index(axis) for axis in range(len(shape))]
    features = math.prod(shape[axis] for axis in own)

    def there(x: jax.Array) -> jax.Array:
        return x.transpose(order).reshape(*(shape[axis] for axis in others), features)

    def back(x: jax.Array) -> jax.Array:
        return x.reshape(moved).transpose(inverse)

    return there, back


def _fast_form(eqn: JaxprEqn) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """Returns our own form of a plain 2-D convolution, which is faster on CPUs; None of others."""
    params = eqn.params
    if eqn.primitive.name != "conv_general_dilated":
        return None
    numbers = params["dimension_numbers"]
    plain = (
        numbers.lhs_spec == (0, 3, 1, 2) == numbers.out_spec and numbers.rhs_spec == (3, 2, 0, 1)
        and set(params["lhs_dilation"]) == set(params["rhs_dilation"]) == {1}
        and len(set(params["window_strides"])) == 1 and params["batch_group_count"] == 1
        and min(side for pair in params["padding"] for side in pair) >= 0
    )  # fmt: skip
    if not plain:
        return None
    stride, groups = params["window_strides"][0], params["feature_group_count"]
    padding = tuple(map(tuple, params["padding"]))
    channels, features = eqn.invars[0].aval.shape[-1], eqn.invars[1].aval.shape[-1]
    if groups == channels == features and groups > 1:
        return lambda x, kernel: depthwise_conv(x, kernel, stride, padding)
    return lambda x, kernel: convolve(x, kernel, stride, padding, groups)


def evaluate(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    product: Callable[[JaxprEqn, list[jax.Array]], jax.Array],
) -> list[Any]:
    """Returns the results of a jaxpr, with `product(eqn, operands)` in place of its products."""
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))
    for eqn in jaxpr.eqns:
        operands = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        inner = called(eqn)
        if eqn.primitive.name in PRODUCTS:
            results = [product(eqn, operands)]
        elif inner is not None and has_products(eqn):
            results = evaluate(inner.jaxpr, inner.consts, operands, product)
        else:
            results = bind(eqn, operands)
        values |= dict(zip(eqn.outvars, results, strict=True))
    return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


def bind(eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
    """Returns the results of an equation as it stands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    found = eqn.primitive.bind(*operands, **params)
    return list(found) if eqn.primitive.multiple_results else [found]


def traced(
    network: Adapter, variables: Mapping[str, Any], x: jax.Array, train: bool, rng: Any
) -> Trace:
    """Returns the traced network; raises UserError for layers that cannot be quantized.

    Traces are kept: their analysis does not depend on the values.
    """
    leaves, structure = jax.tree.flatten((dict(variables), x, rng))
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return _traced(network, structure, shapes, train)


@functools.lru_cache(maxsize=64)
def _traced(network: Adapter, structure: Any, shapes: tuple[Any, ...], train: bool) -> Trace:
    def flat(*leaves: jax.Array) -> Any:
        variables, x, rng = jax.tree.unflatten(structure, leaves)
        return network.apply(variables, x, train, rng)

    closed, results = jax.make_jaxpr(flat, return_shape=True)(*shapes)
    paths = jax.tree_util.tree_leaves_with_path(jax.tree.unflatten(structure, shapes))
    finder = _Finder(network.label)
    outputs = walk(
        closed.jaxpr, closed.consts, [_argument(path) for path, _ in paths], finder.visit
    )
    if not finder.found:
        raise UserError(f"{network.label}: no convolutions or matrix products to quantize")
    return finder.trace(closed, jax.tree.structure(results), outputs[0])


def _argument(path: tuple[Any, ...]) -> Value:
    """Returns what is known of an input of the traced function, by its place in the arguments."""
    number, *keys = path
    if number.idx == 1:
        return Value(image=True)
    if number.idx == 0 and keys[0].key == "params":
        return Value(weights=frozenset({"/".join(str(key.key) for key in keys[1:])}))
    return Value()


class _Product(NamedTuple):
    """A product as met on the walk.

    key: the same for sites that share a layer.
    owner: path of the module, as a name.
    leaf: path of the weights; "" of a product of two inputs.
    """

    key: str
    owner: str
    leaf: str
    weights: int | None
    bounds: tuple[tuple[float, float], ...]
    first: bool
    macs: int
    act_elements: int
    source: str


class _Finder:
    """Collects the products of a network while its jaxpr is walked."""

    def __init__(self, label: str):
        self._label = label
        self.found: list[_Product | None] = []

    def visit(self, eqn: JaxprEqn, operands: list[Value]) -> list[Value] | None:
        """Notes a product; returns what is known of its result, None of other equations."""
        name, image = eqn.primitive.name, [value.image for value in operands]
        if any(image) and has_products(eqn) and (name in LOOPS or name.startswith("custom_")):
            module = _module_of(eqn) or "the network"
            raise UserError(
                f"{self._label}: {module} has layers inside {name}, which "
                f"cannot be quantized one by one ({_source(eqn)}); write them as a Python loop"
            )
        if name not in PRODUCTS:
            return None
        weights = None if all(image) else image.index(False)
        if not any(image) or (weights is not None and not operands[weights].weights):
            self.found.append(None)  # of weights alone, or with constants, such as a fixed blur
            return None
        kind = eqn.outvars[0].aval.dtype
        if kind != jnp.float32:
            raise UserError(
                f"{self._label}: {_module_of(eqn)} computes in {kind} ({_source(eqn)}); expected "
                "float32, and config.compute_dtype for the products"
            )
        leaves = sorted(operands[weights].weights) if weights is not None else []
        key = "&".join(leaves) or f"product {len(self.found)}"
        leaf = leaves[0] if leaves else ""
        acts = operands if weights is None else [operands[1 - weights]]
        before = frozenset().union(*(value.below for value in acts))
        elements = eqn.invars[0 if weights is None else 1 - weights].aval.shape
        self.found.append(
            _Product(
                key=key, owner=leaf.rpartition("/")[0] if leaf else _module_of(eqn), leaf=leaf,
                weights=weights, bounds=tuple(value.bounds for value in operands),
                first=not before, macs=_macs(eqn), act_elements=math.prod(elements),
                source=_source(eqn),
            )
        )  # fmt: skip
        return [Value(image=True, below=frozenset({key}))]

    def trace(self, jaxpr: ClosedJaxpr, outputs: Any, scores: Value) -> Trace:
        """Returns the trace, once the walk is done."""
        products = [product for product in self.found if product is not None]
        names = _names(products)
        layers = {}
        for key, name in names.items():
            own = [product for product in products if product.key == key]
            pair = own[0].weights is None
            operands = (0, 1) if pair else (1 - own[0].weights, own[0].weights)
            kinds = [_kind([product.bounds[i] for product in own]) for i in operands]
            layers[name] = Layer(
                signed=tuple(signed for signed, _ in kinds),
                shift=tuple(shift for _, shift in kinds),
                first=any(product.first for product in own), last=key in scores.below,
                macs=sum(product.macs for product in own),
                act_elements=sum(product.act_elements for product in own),
                pair=pair, source=own[0].source,
            )  # fmt: skip
        sites = tuple(
            product and Site(names[product.key], product.weights) for product in self.found
        )
        return Trace(jaxpr, outputs, sites, layers)


def _names(products: Sequence[_Product]) -> dict[str, str]:
    """Returns key -> name of each layer: its module's path, with more where that is not unique."""
    first = {product.key: product for product in reversed(products)}
    owners = collections.Counter(product.owner for product in first.values())
    names, numbers = {}, collections.Counter()
    for product in products:
        if product.key in names:
            continue
        name = product.owner
        if not product.leaf:
            numbers[name] += 1
            name = f"{name}/product{numbers[name]}".lstrip("/")
        elif owners[name] > 1 or not name:
            name = product.leaf
        names[product.key] = name
    return names


def _kind(bounds: Sequence[tuple[float, float]]) -> tuple[bool, float]:
    """Returns whether a quantizer needs negative levels, and its shift."""
    low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
    if low >= 0:
        return False, 0.0
    if low >= -MOST_SHIFT and high >= -4 * low:
        return False, -low
    return True, 0.0


def has_products(eqn: JaxprEqn) -> bool:
    """Returns whether an equation contains products in what it calls."""
    inner = [value for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
    ) if isinstance(value, ClosedJaxpr | Jaxpr)]  # fmt: skip
    jaxprs = [getattr(value, "jaxpr", value) for value in inner]
    return any(e.primitive.name in PRODUCTS or has_products(e) for j in jaxprs for e in j.eqns)


def _module_of(eqn: JaxprEqn) -> str:
    """Returns the path of the Flax module that an equation comes from, as far as it is known."""
    _, *names = str(eqn.source_info.name_stack).split("/")  # the first is the network's own
    return "/".join(name for name in names if name.isidentifier())  # einsum adds its subscripts


def _source(eqn: JaxprEqn) -> str:
    """Returns the line of the network's own code that an equation comes from."""
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else ()
    for frame in frames:
        if not any(part in frame.file_name for part in _LIBRARIES):
            return f"{frame.file_name}:{frame.line_num}"
    return "unknown line"


def _macs(eqn: JaxprEqn) -> int:
    left, right = (v.aval.shape for v in eqn.invars[:2])
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return out * math.prod(left[axis] for axis in contracted)
    features = right[eqn.params["dimension_numbers"].rhs_spec[0]]
    return out * (math.prod(right) // features)
