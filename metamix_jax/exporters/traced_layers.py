"""The layers of a traced network as nodes: products with their quantizers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from metamix_jax.errors import UserError
from metamix_jax.exporters.graph import Node, Quantizer
from metamix_jax.exporters.integers import integer_kernel, step_sizes
from metamix_jax.exporters.nodes import NodeList
from metamix_jax.networks.intercepted import (
    InterceptedNetwork,
    bind,
    features_last,
    settings_of,
)
from metamix_jax.networks.precision import FULL_BITS, Bits, QuantSettings
from metamix_jax.networks.tracing import UNKNOWN, Layer, Site, Trace, module_of, source_of

TRACED_IMAGES = 13  # a number of images that no other axis is likely to have


class Tensor(NamedTuple):
    """A value of the jaxpr that depends on the image.

    name: of the tensor, whose first axis is the images, the others as in the jaxpr.
    images: where the jaxpr's value has them.
    """

    name: str
    images: int


Known = Tensor | np.ndarray | jax.Array  # or a value without the image


class TracedLayers(NodeList):
    """Nodes of a traced network."""

    def __init__(
        self,
        model: InterceptedNetwork,
        trace: Trace,
        layers: Mapping[str, Layer],
        quant: Mapping[str, Any],
        bits: Mapping[str, Bits],
        image_shape: tuple[int, ...],
        values: bool,
    ):
        super().__init__(image_shape, TRACED_IMAGES, layers=layers)
        self._model, self._layers, self._sites = model, layers, iter(trace.sites)
        self._quant, self._bits = quant, bits
        self._values = values
        self.calls: list[JaxprEqn] = []  # around the equation at hand

    def constants(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        """Returns the results of an equation that does not depend on the image."""
        if not self._values:
            return [np.ones(v.aval.shape, np.float32) for v in eqn.outvars]
        return bind(eqn, [jnp.asarray(operand) for operand in operands])

    def product(self, eqn: JaxprEqn, operands: list[Known]) -> Known:
        """Adds the nodes of a product: of a layer, if it depends on the image."""
        site = next(self._sites)
        if not any(isinstance(operand, Tensor) for operand in operands):
            return self.constants(eqn, operands)[0]
        if site is None:
            raise self.refusal(eqn, "; it multiplies with constants")
        if eqn.primitive.name == "conv_general_dilated":
            return self._conv(eqn, site, operands)
        if site.weights is None:
            return self._pair(eqn, site, operands)
        return self._dense(eqn, site, operands)

    def _conv(self, eqn: JaxprEqn, site: Site, operands: list[Known]) -> Tensor:
        params, numbers = eqn.params, eqn.params["dimension_numbers"]
        dilation = {*params["lhs_dilation"], *params["rhs_dilation"]}
        usual = (
            site.weights == 1 and operands[0].images == 0
            and numbers.lhs_spec == (0, 3, 1, 2) == numbers.out_spec
            and numbers.rhs_spec == (3, 2, 0, 1) and dilation == {1}
            and len(set(params["window_strides"])) == 1 and params["batch_group_count"] == 1
            and min(side for pair in params["padding"] for side in pair) >= 0
            and operands[1].shape[0] == operands[1].shape[1]
        )  # fmt: skip
        if not usual:
            raise self.refusal(eqn, "; expected a square kernel and stride, and no dilation")
        options = {
            "stride": int(params["window_strides"][0]),
            "groups": int(params["feature_group_count"]),
            "padding": tuple(plain(pair) for pair in params["padding"]),
        }
        x, kernel = operands[0].name, jnp.asarray(operands[1])
        return Tensor(self._layer("conv", site.layer, x, kernel, options=options), 0)

    def _dense(self, eqn: JaxprEqn, site: Site, operands: list[Known]) -> Tensor:
        """The last axis times a matrix; others are moved there and back."""
        there, _ = features_last(eqn, site.weights)
        x, weights = operands[1 - site.weights], operands[site.weights]
        contracted, batch = eqn.params["dimension_numbers"]
        taken, summed = contracted[1 - site.weights], contracted[site.weights]
        sides = eqn.invars[1 - site.weights].aval.shape
        kept = [axis for axis in range(len(sides)) if axis not in taken]
        if batch[0] or x.images not in kept:
            raise self.refusal(eqn)
        others = [axis for axis in kept if axis != x.images]
        # In the order of the kernel's axes.
        last = [taken[summed.index(axis)] for axis in sorted(summed)]
        kernel = there(jnp.asarray(weights))
        kernel = kernel.reshape(-1, kernel.shape[-1])
        rows = [sides[axis] for axis in others]
        moved = self.moved(x, [*others, *last])
        name = self.add("reshape", moved, shape=plain([*rows, kernel.shape[0]]))
        name = self._layer("dense", site.layer, name, kernel)
        features = [side for axis, side in enumerate(weights.shape) if axis not in summed]
        name = self.add("reshape", name, shape=plain([*rows, *features]))
        if site.weights == 1:
            return Tensor(name, kept.index(x.images))
        count = len(others)
        order = [*range(count + 1, count + 1 + len(features)), *range(1, count + 1)]
        name = self.add("transpose", name, order=tuple(order))
        return Tensor(name, len(features) + kept.index(x.images))

    def _pair(self, eqn: JaxprEqn, site: Site, operands: list[Known]) -> Tensor:
        """Matrices times matrices: the axes of both are moved to [images, ..., rows, columns]."""
        contracted, batch = eqn.params["dimension_numbers"]
        places = [
            list(shared).index(x.images) if x.images in shared else None
            for x, shared in zip(operands, batch, strict=True)
        ]
        if places[0] is None or places[0] != places[1]:
            raise self.refusal(eqn)
        matrices, outer, results = [], [], []
        for number, (x, shared, summed) in enumerate(zip(operands, batch, contracted, strict=True)):
            sides = eqn.invars[number].aval.shape
            shared = [axis for axis in shared if axis != x.images]
            own = [a for a in range(len(sides)) if a not in (*shared, *summed, x.images)]
            rows, columns = (own, summed) if number == 0 else (summed, own)
            moved = self.moved(x, [*shared, *rows, *columns])
            outer = [sides[axis] for axis in shared]
            matrix = [math.prod(sides[axis] for axis in part) for part in (rows, columns)]
            matrices.append(self.add("reshape", moved, shape=plain([*outer, *matrix])))
            results += [sides[axis] for axis in own]
        name, layer, bits = site.layer, self._layers[site.layer], self._bits[site.layer]
        settings = settings_of(self._model.settings, layer)
        first, second = (
            _quantizer(settings, widths, self._of(path)["act_step"], width, signed, shift)
            for widths, path, width, signed, shift in zip(
                (settings.act_bits, settings.weight_bits), (name, f"{name}/other"), bits,
                layer.signed, layer.shift, strict=True,
            )
        )  # fmt: skip
        node = Node(
            "product", self.unique(name), tuple(matrices), (), quantizer=first, other=second
        )
        name = self.add("reshape", self.append(node), shape=plain([*outer, *results]))
        return Tensor(name, places[0])

    def _layer(
        self, op: str, name: str, x: str, kernel: jax.Array, options: Mapping | None = None
    ) -> str:
        layer, bits, quant = self._layers[name], self._bits[name], self._of(name)
        settings = settings_of(self._model.settings, layer)
        quantizer = None
        if bits.act != FULL_BITS:
            quantizer = _quantizer(
                settings, settings.act_bits, quant["act_step"], bits.act, layer.signed[0],
                layer.shift[0],
            )  # fmt: skip
        integers = integer_kernel(
            settings, kernel, quant["weight_step"], bits.weight, values=self._values
        )
        return self.append(
            Node(op, self.unique(name), (x,), (), options=options or {}, quantizer=quantizer,
                 kernel=integers)
        )  # fmt: skip

    def _of(self, path: str) -> Mapping[str, Any]:
        found = self._quant
        for key in path.split("/"):
            found = found.get(key, {})  # a layer at 32 bits has no quantization state
        return found

    def moved(self, x: Tensor, order: Sequence[int]) -> str:
        """Adds a transposition to the images, then these axes of the jaxpr's value."""
        return self.add("transpose", x.name, order=tuple(own_axis(x, axis) + 1 for axis in order))

    def module_at(self, eqn: JaxprEqn) -> str:
        """Returns the path of the module that an equation comes from, "" if that is not known.

        What a compiled function contains may not say where it comes from, but its call does.
        """
        return next(filter(None, map(module_of, (eqn, *reversed(self.calls)))), "")

    def refusal(self, eqn: JaxprEqn, more: str = "") -> UserError:
        """Returns the error for an equation that cannot be exported."""
        known = (eqn, *reversed(self.calls))
        module = self.module_at(eqn) or "the network"
        line = next((line for line in map(source_of, known) if line != UNKNOWN), UNKNOWN)
        label, name = self._model.network.label, eqn.primitive.name
        return UserError(f"{label}: {name} in {module} cannot be exported ({line}){more}")


def own_axis(x: Tensor, axis: int) -> int:
    """Returns the axis of a tensor, without the images, that is `axis` of the jaxpr's value."""
    return int(axis) - int(axis > x.images)


def plain(numbers: Sequence[int]) -> tuple[int, ...]:
    """Returns numbers as Python's own, for a node's options."""
    return tuple(int(number) for number in numbers)


def _quantizer(
    settings: QuantSettings,
    widths: Sequence[int],
    stored: Any,
    bits: int,
    signed: bool,
    shift: float,
) -> Quantizer:
    return Quantizer(bits, signed, float(step_sizes(settings, stored)[widths.index(bits)]), shift)
