"""Layers: products whose operands, an input and a kernel or two inputs, are quantized.

All candidate bit-widths share one kernel. How a layer runs is an argument of the forward pass
(`Precision`); layers and networks know nothing of training phases.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from metamix_jax.networks.kernels import bfloat16
from metamix_jax.networks.kernels.bfloat16 import Operand
from metamix_jax.networks.kernels.xla_cpu import keeping_arguments
from metamix_jax.networks.precision import FULL_BITS, LayerCost, Precision, QuantSettings
from metamix_jax.networks.quantizers import POSITIVE_STEPS, fake_quant, init_step

LOGIT_INIT_SCALE = 1e-3  # standard deviation of the initial architecture logits


class QuantLayer(nn.Module):
    """Quantizers of a layer's input (per tensor) and kernel (per output channel).

    Collection `quant`: `act_step` [activation widths] and `weight_step` [weight widths, features]
    in the stored form of `settings.positive_step` (real units for "floor"), `logits` [branches] if
    searched. Branches of the same width share its step.
    """

    settings: QuantSettings
    signed: bool = False  # whether the input can be negative
    shift: float = 0.0  # minus the least input, such as 3/8 of hswish's output

    def _input_quantizer(
        self, x: jax.Array, precision: Precision
    ) -> Callable[[jax.Array | int], Operand]:
        """Returns a function from the index of an activation width to the quantized input."""
        bits, mode = self.settings.act_bits, precision.activations
        # Recorded only if a caller makes "intermediates" mutable; `init` does not.
        self.sow("intermediates", "quantizer_input", x)
        if bits == (FULL_BITS,):
            return lambda index: Operand(x)
        kind = {"signed": self.signed, "shift": self.shift}
        first_step = functools.partial(init_step, rule=self.settings.init_rule, **kind)
        x = self._probe("act", x, bits, first_step, kind)
        if mode == "full" and not self.is_initializing():
            # Uses no quantization state, which e.g. a teacher does not have.
            return lambda index: Operand(x)
        positive = POSITIVE_STEPS[self.settings.positive_step]
        stored = self.variable("quant", "act_step", lambda: positive.raw(jnp.ones(len(bits))))

        def quantized(index: jax.Array | int) -> Operand:
            step, width = _pick(positive.step(stored.value), bits, index)
            # Otherwise its gradient would save as much as the rest of the layer's.
            fake = keeping_arguments(functools.partial(fake_quant, **kind))
            return self._operand(fake(x, step, jnp.asarray(width)), x, step, width, kind=kind)

        if mode in ("calibrate", "calibrate_lowest"):
            stored.value = positive.raw(jnp.stack([first_step(x, b) for b in bits]))
        if mode == "calibrate_lowest":
            return lambda index: quantized(bits.index(min(bits)))
        return (lambda index: Operand(x)) if mode in ("full", "calibrate") else quantized

    def _kernel_quantizer(
        self, kernel: jax.Array, precision: Precision
    ) -> Callable[[jax.Array | int], Operand]:
        """Returns a function from the index of a weight width to the quantized kernel."""
        bits, mode = self.settings.weight_bits, precision.weights
        # The "unshifted" rule applies to activations only.
        rule = "mse" if self.settings.init_rule == "mse" else "shifted"
        first_step = functools.partial(init_step, signed=True, rule=rule, per_channel=True)
        kernel = self._probe("weight", kernel, bits, first_step, {"signed": True})
        if mode == "full" and not self.is_initializing():
            return lambda index: Operand(kernel)
        positive = POSITIVE_STEPS[self.settings.positive_step]
        shape = (len(bits), kernel.shape[-1])
        stored = self.variable("quant", "weight_step", lambda: positive.raw(jnp.ones(shape)))

        def quantized(index: jax.Array | int) -> Operand:
            step, width = _pick(positive.step(stored.value), bits, index)
            real = fake_quant(kernel, step, width, signed=True)
            return self._operand(real, kernel, step, width, kind={"signed": True})

        if mode == "calibrate":
            stored.value = positive.raw(jnp.stack([first_step(kernel, b) for b in bits]))
        return quantized if mode == "quantized" else lambda index: Operand(kernel)

    def _operand(self, real: jax.Array, *quantized: jax.Array | int, kind: dict) -> Operand:
        """Returns real = fake_quant(*quantized, **kind) as an operand of the product."""
        in_levels = self.settings.compute_dtype == "bfloat16"
        return bfloat16.take_apart(real, *quantized, **kind) if in_levels else Operand(real)

    def _probe(
        self, name: str, x: jax.Array, bits: tuple[int, ...], first_step: Callable, kind: dict
    ) -> jax.Array:
        """Returns the tensor to quantize, instrumented for searchers/hessian.py.

        Adds collection `perturbations` if it is passed in; stores the mean squared errors [widths]
        at newly initialized step sizes in `errors` if that is mutable. Otherwise returns `x`.
        """
        if len(bits) == 1 or self.is_initializing():  # `init` makes every collection mutable
            return x
        if self.is_mutable_collection("errors"):
            levels = [fake_quant(x, first_step(x, b), b, **kind) for b in bits]
            self.put_variable("errors", name, jnp.stack([jnp.mean((q - x) ** 2) for q in levels]))
        return self.perturb(name, x)


def _pick(
    steps: jax.Array, bits: tuple[int, ...], index: jax.Array | int
) -> tuple[jax.Array, jax.Array | int]:
    """Returns the step size and the width at `index`; the width is an int if `index` is."""
    if len(bits) == 1:
        index = 0
    width = bits[index] if isinstance(index, int) else jnp.asarray(bits, jnp.int32)[index]
    return steps[index], width


class QuantProduct(QuantLayer):
    """A product of an input and a kernel that is given, as in a traced network (intercepted.py).

    macs, act_elements: recorded as the layer's cost.
    """

    macs: int = 0
    act_elements: int = 0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        kernel: jax.Array,
        precision: Precision,
        multiply: Callable[..., jax.Array],
    ) -> jax.Array:
        """Returns multiply(input, kernel [..., features]), both quantized as `precision` says.

        As `multiply` is linear, a mixture over pairs costs one product per weight width, not one
        per pair: sum_aw p_aw Q_a(x) * Q_w(kernel) = sum_w (sum_a p_aw Q_a(x)) * Q_w(kernel).
        """
        self._record_cost(kernel)

        def product(x: Operand, kernel: Operand) -> jax.Array:
            if self.settings.compute_dtype == "bfloat16":
                return bfloat16.product(multiply, x, kernel)
            return multiply(x.real, kernel.real)

        widths = len(self.settings.act_bits), len(self.settings.weight_bits)
        mode, searched = precision.activations, math.prod(widths) > 1
        quantized_input = self._input_quantizer(x, precision)
        quantized_kernel = self._kernel_quantizer(kernel, precision)
        if searched and (mode == "mixture" or self.is_initializing()):
            logits = self.variable("quant", "logits", self._init_logits)
        if searched and mode == "mixture":
            shares = jax.nn.softmax(precision.at_temperature(logits.value)).reshape(widths)
            if precision.weights != "quantized":
                shares = shares.sum(axis=1, keepdims=True)
            inputs = [quantized_input(i).real for i in range(widths[0])]
            mixtures = (
                sum(shares[i, j] * x for i, x in enumerate(inputs)) for j in range(shares.shape[1])
            )
            products = (product(Operand(x), quantized_kernel(j)) for j, x in enumerate(mixtures))
            return functools.reduce(operator.add, products)
        branch = 0
        if searched and mode == "chosen":
            branch = precision.branches["/".join(self.path)]
        elif searched and isinstance(mode, int):
            branch = mode
        return product(quantized_input(branch // widths[1]), quantized_kernel(branch % widths[1]))

    def _weight_elements(self, kernel: jax.Array) -> int:
        return kernel.size

    def _init_logits(self) -> jax.Array:
        branches = len(self.settings.act_bits) * len(self.settings.weight_bits)
        return LOGIT_INIT_SCALE * jax.random.normal(self.make_rng("quant"), (branches,))

    def _record_cost(self, kernel: jax.Array) -> None:
        if self.is_initializing():
            cost = LayerCost(
                macs=self.macs,
                act_elements=self.act_elements,
                weight_elements=self._weight_elements(kernel),
                act_bits=self.settings.act_bits,
                weight_bits=self.settings.weight_bits,
            )
            self.variable("costs", "cost", lambda: cost)


class QuantPair(QuantProduct):
    """A product of two inputs; the second is quantized with the first, to the last layer's bits.

    other_signed, other_shift: as signed and shift, of the second.
    """

    other_signed: bool = False
    other_shift: float = 0.0

    def _kernel_quantizer(
        self, kernel: jax.Array, precision: Precision
    ) -> Callable[[jax.Array | int], Operand]:
        settings = dataclasses.replace(self.settings, act_bits=self.settings.weight_bits)
        other = _Input(settings, self.other_signed, self.other_shift, name="other")
        return other(kernel, precision)

    def _weight_elements(self, kernel: jax.Array) -> int:
        return 0


class _Input(QuantLayer):
    """The quantizer of one more input."""

    @nn.compact
    def __call__(self, x: jax.Array, precision: Precision) -> Callable[[jax.Array | int], Operand]:
        return self._input_quantizer(x, precision)
