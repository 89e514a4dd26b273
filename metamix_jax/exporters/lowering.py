"""Builds the exported graph of any network from its jaxpr.

What does not depend on the image is computed here; every other equation becomes a node, the
products that are layers with their quantizers. Tensors of the graph have the images first; in the
jaxpr that axis may lie elsewhere, so it is tracked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from metamix_jax.exporters.graph import IMAGE, Node
from metamix_jax.exporters.traced_layers import (
    TRACED_IMAGES,
    Known,
    Tensor,
    TracedLayers,
    own_axis,
    plain,
)
from metamix_jax.networks.dataflow import called
from metamix_jax.networks.intercepted import InterceptedNetwork
from metamix_jax.networks.precision import Bits
from metamix_jax.networks.tracing import PRODUCTS, traced

UNARY = {  # primitive -> operation of an exported graph
    "abs": "abs", "erf": "erf", "exp": "exp", "floor": "floor", "log": "log", "logistic": "sigmoid",
    "neg": "negate", "rsqrt": "rsqrt", "sign": "sign", "sqrt": "sqrt", "tanh": "tanh",
}  # fmt: skip
BINARY = {
    "add": "add", "add_any": "add", "sub": "subtract", "mul": "multiply", "div": "divide",
    "max": "maximum", "min": "minimum", "ge": "greater_equal", "gt": "greater", "le": "less_equal",
    "lt": "less",
}  # fmt: skip
REDUCTIONS = {"reduce_sum": "sum", "reduce_max": "greatest", "reduce_min": "least"}
WINDOWS = {"reduce_window_max": "max_window", "reduce_window_sum": "sum_window"}
UNCHANGED = frozenset({
    "copy", "optimization_barrier", "reduce_precision", "sharding_constraint", "stop_gradient",
})  # fmt: skip


def lower(
    model: InterceptedNetwork,
    variables: Mapping[str, Any],
    bits: Mapping[str, Bits],
    image_shape: tuple[int, ...],
    *,
    values: bool = True,
) -> tuple[Node, ...]:
    """Returns the nodes of a network at the bits of its layers.

    Args:
      model: the network.
      variables: params, batch_stats and quant.
      bits: path of every layer -> its widths.
      image_shape: (height, width, channels).
      values: whether to compute what does not depend on the image; without, only shapes are right.

    Raises:
      UserError: an operation that cannot be exported, with its module and line.
    """
    own = {name: variables[name] for name in ("params", "batch_stats") if variables.get(name)}
    images = jax.ShapeDtypeStruct((TRACED_IMAGES, *image_shape), jnp.float32)
    trace = traced(model.network, own, images, False, None)
    layers = model.layers(own, images)
    lowering = _Lowering(model, trace, layers, variables["quant"], bits, image_shape, values)
    arguments = [*jax.tree.leaves(own), Tensor(IMAGE, 0)]
    (scores,) = lowering.walk(trace.jaxpr.jaxpr, trace.jaxpr.consts, arguments)[:1]
    assert scores == (lowering.nodes[-1].name, 0), "the scores are the last tensor"
    return tuple(lowering.nodes)


class _Lowering(TracedLayers):
    """Collects the nodes while the jaxpr is walked."""

    def walk(self, jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Known]) -> list[Known]:
        """Returns the outputs of a jaxpr."""
        known: dict[Any, Known] = dict(zip(jaxpr.constvars, consts, strict=True))
        known |= dict(zip(jaxpr.invars, arguments, strict=True))
        for eqn in jaxpr.eqns:
            operands = [v.val if isinstance(v, Literal) else known[v] for v in eqn.invars]
            inner = called(eqn)
            if inner is not None:
                self.calls.append(eqn)
                results = self.walk(inner.jaxpr, inner.consts, operands)
                self.calls.pop()
            elif eqn.primitive.name in PRODUCTS:
                results = [self.product(eqn, operands)]
            elif not any(isinstance(operand, Tensor) for operand in operands):
                results = self.constants(eqn, operands)
            else:
                self.place = self.module_at(eqn)
                results = self._operation(eqn, operands)
            known |= dict(zip(eqn.outvars, results, strict=True))
        return [v.val if isinstance(v, Literal) else known[v] for v in jaxpr.outvars]

    # Operations between layers ------------------------------------------------------------------

    def _operation(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        name, params, x = eqn.primitive.name, eqn.params, operands[0]
        if name in UNCHANGED:
            return operands
        if name in UNARY:
            return [Tensor(self.add(UNARY[name], x.name), x.images)]
        if name in BINARY:
            return [self._elementwise(eqn, BINARY[name], *operands)]
        if name in REDUCTIONS:
            axes = tuple(sorted(self._inner(eqn, x, params["axes"])))
            images = x.images - sum(axis < x.images for axis in params["axes"])
            return [Tensor(self.add(REDUCTIONS[name], x.name, axes=axes), images)]
        if name in WINDOWS:
            return [self._window(eqn, x)]
        if name in _HANDLERS:
            return _HANDLERS[name](self, eqn, operands)
        raise self.refusal(eqn)

    def _elementwise(self, eqn: JaxprEqn, op: str, *operands: Known, **options: Any) -> Tensor:
        """Adds a node whose operands have the images along the same axis."""
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        images = tensors[0].images
        if any(tensor.images != images for tensor in tensors):
            raise self.refusal(eqn)
        inputs = []
        for operand in operands:
            if not isinstance(operand, Tensor):
                operand = np.asarray(operand, np.float32)
                if op == "maximum" and np.all(operand == -np.inf):  # of softmax
                    return tensors[0]
                if not np.isfinite(operand).all():
                    raise self.refusal(eqn, "; it has a constant that is not finite")
                operand = np.moveaxis(operand, images, 0) if operand.ndim else operand
            inputs.append(operand.name if isinstance(operand, Tensor) else operand)
        return Tensor(self.add(op, *inputs, **options), images)

    def _reshape(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        """Also squeeze and expand_dims: what lies before and behind the images stays there."""
        x, old, new = operands[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        before = math.prod(old[: x.images])
        for axis, side in enumerate(new):
            if side == TRACED_IMAGES and math.prod(new[:axis]) == before:
                shape = (*new[:axis], *new[axis + 1 :])
                return [Tensor(self.add("reshape", x.name, shape=plain(shape)), axis)]
        raise self.refusal(eqn, "; it mixes images")

    def _broadcast(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        x, places = operands[0], eqn.params["broadcast_dimensions"]
        shape = eqn.outvars[0].aval.shape
        given = [1] * len(shape)
        for axis, place in enumerate(places):
            given[place] = eqn.invars[0].aval.shape[axis]
        images = int(places[x.images])
        given, shape = ((*sides[:images], *sides[images + 1 :]) for sides in (given, shape))
        name = self.add("reshape", x.name, shape=plain(given))
        return [Tensor(self.add("expand", name, shape=plain(shape)), images)]

    def _transpose(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        x, order = operands[0], [int(axis) for axis in eqn.params["permutation"]]
        images = order.index(x.images)
        return [Tensor(self.moved(x, [axis for axis in order if axis != x.images]), images)]

    def _convert(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        if eqn.params["new_dtype"] != jnp.float32:
            raise self.refusal(eqn)
        return operands[:1]

    def _power(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        number = eqn.params.get("y", 2)  # square has none
        if number == 0:
            raise self.refusal(eqn)
        x = result = operands[0].name
        for _ in range(abs(number) - 1):
            result = self.add("multiply", result, x)
        if number < 0:
            result = self.add("divide", np.float32(1), result)
        return [Tensor(result, operands[0].images)]

    def _with_one(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        """Adds expm1, log1p and erfc as their definitions."""
        name, x, one = eqn.primitive.name, operands[0].name, np.float32(1)
        if name == "expm1":
            result = self.add("subtract", self.add("exp", x), one)
        elif name == "log1p":
            result = self.add("log", self.add("add", x, one))
        else:
            result = self.add("subtract", one, self.add("erf", x))
        return [Tensor(result, operands[0].images)]

    def _clamp(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        low, x, high = operands
        x = self._elementwise(eqn, "maximum", x, low)
        return [self._elementwise(eqn, "minimum", x, high)]

    def _select(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        if len(operands) != 3:
            raise self.refusal(eqn)
        condition, when_false, when_true = operands
        return [self._elementwise(eqn, "where", condition, when_true, when_false)]

    def _slice(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        params = eqn.params
        strides = params["strides"] or (1,) * len(params["start_indices"])
        bounds = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
        return [self._taken(eqn, operands[0], bounds)]

    def _split(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        axis, start, parts = eqn.params["axis"], 0, []
        whole = [(0, side, 1) for side in eqn.invars[0].aval.shape]
        for size in eqn.params["sizes"]:
            bounds = [*whole[:axis], (start, start + size, 1), *whole[axis + 1 :]]
            parts.append(self._taken(eqn, operands[0], bounds))
            start += size
        return parts

    def _taken(self, eqn: JaxprEqn, x: Tensor, bounds: Sequence[tuple[int, int, int]]) -> Tensor:
        bounds = [plain(bound) for bound in bounds]
        if bounds.pop(x.images) != (0, TRACED_IMAGES, 1):
            raise self.refusal(eqn, "; it takes some of the images")
        return Tensor(self.add("slice", x.name, bounds=tuple(bounds)), x.images)

    def _concatenate(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        images = next(x.images for x in operands if isinstance(x, Tensor))
        (axis,) = self._inner(eqn, Tensor("", images), (eqn.params["dimension"],))
        return [self._elementwise(eqn, "concatenate", *operands, axis=axis)]

    def _pad(self, eqn: JaxprEqn, operands: list[Known]) -> list[Known]:
        x, value = operands
        margins = [plain(pair) for pair in eqn.params["padding_config"]]
        if margins.pop(x.images) != (0, 0, 0) or isinstance(value, Tensor) or np.min(margins) < 0:
            raise self.refusal(eqn)
        if any(inner for *_, inner in margins):
            raise self.refusal(eqn)
        margins = tuple((low, high) for low, high, _ in margins)
        return [Tensor(self.add("pad", x.name, margins=margins, value=float(value)), x.images)]

    def _window(self, eqn: JaxprEqn, x: Tensor) -> Tensor:
        params = eqn.params
        size, strides = (plain(params[key]) for key in ("window_dimensions", "window_strides"))
        dilated = {*params.get("base_dilation", ()), *params.get("window_dilation", ())} - {1}
        if x.images or len(size) != 4 or size[0] != 1 or size[3] != 1 or dilated:
            raise self.refusal(eqn, "; expected windows along height and width")
        padding = tuple(plain(pair) for pair in params["padding"][1:3])
        op = WINDOWS[eqn.primitive.name]
        name = self.add(op, x.name, size=size[1:3], strides=strides[1:3], padding=padding)
        return Tensor(name, 0)

    def _inner(self, eqn: JaxprEqn, x: Tensor, axes: Sequence[int]) -> tuple[int, ...]:
        """Returns axes of the jaxpr's value as axes of the tensor without the images."""
        if x.images in axes:
            raise self.refusal(eqn, "; it runs over the images")
        return tuple(own_axis(x, axis) for axis in axes)


_HANDLERS: Mapping[str, Callable[..., list[Known]]] = {
    "broadcast_in_dim": _Lowering._broadcast,
    "clamp": _Lowering._clamp,
    "concatenate": _Lowering._concatenate,
    "convert_element_type": _Lowering._convert,
    "erfc": _Lowering._with_one,
    "expand_dims": _Lowering._reshape,
    "expm1": _Lowering._with_one,
    "integer_pow": _Lowering._power,
    "log1p": _Lowering._with_one,
    "pad": _Lowering._pad,
    "reshape": _Lowering._reshape,
    "select_n": _Lowering._select,
    "slice": _Lowering._slice,
    "split": _Lowering._split,
    "square": _Lowering._power,
    "squeeze": _Lowering._reshape,
    "transpose": _Lowering._transpose,
}
