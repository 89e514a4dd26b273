"""Any Flax image classifier with its convolutions and products quantized, its code unchanged.

The network is traced; the equations of its jaxpr are evaluated as they stand, except products of an
input with weights (convolutions, dense layers, einsums) and of two inputs (attention). Those are
layers: their operands go through the quantizers of layers.py, whose state is in the collection
`quant` under the path of the module that owns the weights.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.typing import DTypeLike

from metamix_jax.networks.adapters import Adapter
from metamix_jax.networks.dataflow import called
from metamix_jax.networks.kernels.convolution import convolve
from metamix_jax.networks.kernels.depthwise import depthwise_conv
from metamix_jax.networks.layer_rules import ruled
from metamix_jax.networks.layers import QuantPair, QuantProduct
from metamix_jax.networks.precision import FULL, Precision, QuantSettings
from metamix_jax.networks.tracing import PRODUCTS, Layer, Site, has_products, traced

WATCHED = ("intermediates", "perturbations", "errors")  # collections of the layers' probes


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
        # Keys are the root's own, so that the network makes of them what it would by itself.
        if self.is_initializing():
            for collection, tree in self.network.init(self.scope.rngs["params"].rng, x).items():
                for name, value in tree.items():
                    self.put_variable(collection, name, value)
        rng = self.scope.rngs["dropout"].rng if train and self.has_rng("dropout") else None
        variables = {
            name: dict(self.variables[name])
            for name in ("params", "batch_stats")
            if name in self.variables
        }
        watched = any(map(self.is_mutable_collection, WATCHED)) or "perturbations" in self.variables
        unchanged = precision == FULL and self.settings.compute_dtype == "float32"
        if unchanged and not (train or watched or self.is_initializing()):
            return self.network.apply(variables, x, train, rng)[0]
        trace = traced(self.network, variables, x, train, rng)
        layers = self.layers(variables, x)
        modules = {name: self._module(name, layers[name]) for name in trace.layers}
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

    @nn.nowrap
    def layers(self, variables: Mapping[str, Any], x: jax.Array) -> dict[str, Layer]:
        """Returns the layers by name: as found in evaluation mode, and as the rules want them.

        In training, dropout would widen the bounds of what it scales.
        """
        found = traced(self.network, variables, x, False, None).layers
        return ruled(found, self.settings.rules)

    def _module(self, name: str, layer: Layer) -> QuantProduct:
        """Returns the layer's quantizers, with their variables in the scope of its path."""
        scope = self.scope
        for part in name.split("/"):
            scope = scope.push(part, reuse=True)
        facts = {"macs": layer.macs, "act_elements": layer.act_elements}
        if layer.pair:
            facts |= {"other_signed": layer.signed[1], "other_shift": layer.shift[1]}
        kind = QuantPair if layer.pair else QuantProduct
        settings = settings_of(self.settings, layer)
        return kind(settings, signed=layer.signed[0], shift=layer.shift[0], parent=scope, **facts)


def settings_of(settings: QuantSettings, layer: Layer) -> QuantSettings:
    """Returns the settings of a layer: the first and the last are not searched, nor by a rule."""
    if layer.bits:
        return settings.fixed(layer.bits)
    if layer.first:
        settings = settings.stem()
    elif layer.last:
        settings = settings.ends()
    if layer.pair:
        settings = dataclasses.replace(settings, weight_bits=(settings.first_last_bits,))
    return settings


def _quantized(
    module: QuantProduct,
    site: Site,
    eqn: JaxprEqn,
    operands: list[jax.Array],
    precision: Precision,
) -> jax.Array:
    """Returns a product of quantized operands; weights are given with their features last."""
    second = 1 if site.weights is None else site.weights
    there, back = features_last(eqn, second) if site.weights is not None else (_same, _same)
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


def features_last(
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
