"""Finds the layers of any network: traces it and walks its jaxpr.

Layers are the products of an input with weights (convolutions, dense layers, einsums) and of two
inputs (attention). Each is named after the module that owns the weights.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from metamix_jax.errors import UserError
from metamix_jax.networks.adapters import Adapter
from metamix_jax.networks.dataflow import Value, walk
from metamix_jax.networks.precision import Bits

PRODUCTS = ("conv_general_dilated", "dot_general")
LOOPS = ("scan", "while", "cond")
# The largest shift: inputs that fall further below 0 are quantized with a sign.
MOST_SHIFT = 1.0
UNKNOWN = "unknown line"
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
    bits: its widths, if it is not searched because of a rule.
    """

    signed: tuple[bool, bool]
    shift: tuple[float, float]
    first: bool
    last: bool
    macs: int
    act_elements: int
    pair: bool
    source: str
    bits: Bits | None = None


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
    if not any(finder.found):
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
            module = module_of(eqn) or "the network"
            raise UserError(
                f"{self._label}: {module} has layers inside {name}, which "
                f"cannot be quantized one by one ({source_of(eqn)}); write them as a Python loop"
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
                f"{self._label}: {module_of(eqn)} computes in {kind} ({source_of(eqn)}); expected "
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
                key=key, owner=leaf.rpartition("/")[0] if leaf else module_of(eqn), leaf=leaf,
                weights=weights, bounds=tuple(value.bounds for value in operands),
                first=not before, macs=_macs(eqn), act_elements=math.prod(elements),
                source=source_of(eqn),
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


def module_of(eqn: JaxprEqn) -> str:
    """Returns the path of the Flax module that an equation comes from, as far as it is known."""
    _, *names = str(eqn.source_info.name_stack).split("/")  # the first is the network's own
    return "/".join(name for name in names if name.isidentifier())  # einsum adds its subscripts


def source_of(eqn: JaxprEqn) -> str:
    """Returns the line of the network's own code that an equation comes from."""
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else ()
    for frame in frames:
        if not any(part in frame.file_name for part in _LIBRARIES):
            return f"{frame.file_name}:{frame.line_num}"
    return UNKNOWN


def _macs(eqn: JaxprEqn) -> int:
    left, right = (v.aval.shape for v in eqn.invars[:2])
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return out * math.prod(left[axis] for axis in contracted)
    features = right[eqn.params["dimension_numbers"].rhs_spec[0]]
    return out * (math.prod(right) // features)
