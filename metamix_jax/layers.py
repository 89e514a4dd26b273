"""QuantConv and QuantDense: layers that quantize their input and their kernel.

One kernel serves every candidate bit-width. How a layer runs is an argument of the forward pass
(`Precision`); nothing in a layer or a model knows that training phases exist.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from metamix_jax.depthwise import depthwise_conv
from metamix_jax.quantizers import POSITIVE_STEPS, fake_quant, init_step

LOGIT_INIT_SCALE = 1e-3  # standard deviation of the initial architecture logits
HSWISH_SHIFT = 3 / 8  # minus the minimum of hswish
FULL_BITS = 32  # a width that means "not quantized"


@struct.dataclass
class Precision:
    """How all quantized layers run in one forward pass.

    activations: "full" (not quantized); an int k (branch k everywhere); "mixture" (softmax over the
      branches, Eq. 2); "chosen" (branch `branches[layer path]`, other branches cost nothing);
      "calibrate" (not quantized, step sizes initialised from what passes); "calibrate_lowest"
      (the same, but the lowest branch's output is passed on).
    weights: "full", "quantized" or "calibrate" (weight steps initialised, then quantized).
    branches: layer path -> index of the chosen branch, int32 scalars; may be traced.
    """

    activations: str | int = struct.field(pytree_node=False, default="full")
    weights: str = struct.field(pytree_node=False, default="full")
    branches: Mapping[str, jax.Array] | None = None


FULL = Precision()


@struct.dataclass
class LayerCost:
    """Static facts of one quantized layer, per image; a pytree without leaves."""

    macs: int = struct.field(pytree_node=False)  # multiply-accumulates
    act_elements: int = struct.field(pytree_node=False)  # input activations
    act_bits: tuple[int, ...] = struct.field(pytree_node=False)  # candidates; one entry = fixed
    weight_bits: int = struct.field(pytree_node=False)

    @property
    def searched(self) -> bool:
        """Whether a bit-width is to be chosen for this layer."""
        return len(self.act_bits) > 1


@dataclasses.dataclass(frozen=True)
class QuantSettings:
    """What a network's layers have in common; fields as in config.quant."""

    act_bits: tuple[int, ...] = (8, 4, 3)
    weight_bits: int = 4
    first_last_bits: int = 8
    image_bits: int = 8
    init_rule: str = "shifted"
    positive_step: str = "floor"

    def ends(self) -> "QuantSettings":
        """Returns the settings of the last layer: fixed, not searched."""
        bits = self.first_last_bits
        return dataclasses.replace(self, act_bits=(bits,), weight_bits=bits)

    def stem(self) -> "QuantSettings":
        """Returns the settings of the first layer, whose activations are the image."""
        return dataclasses.replace(self.ends(), act_bits=(self.image_bits,))


class _QuantLayer(nn.Module):
    """Quantizers of a layer's input (per tensor) and kernel (per output channel).

    Collection `quant`: `act_step` [candidates] and `weight_step` [features] in the stored form of
    `settings.positive_step` (real units for "floor"), `logits` [candidates] if searched.
    """

    features: int
    settings: QuantSettings
    signed: bool = False  # the input takes both signs
    shift: float = 0.0  # HSWISH_SHIFT for a hswish output
    use_bias: bool = False

    def _quantize_input(self, x: jax.Array, precision: Precision) -> jax.Array:
        bits, mode = self.settings.act_bits, precision.activations
        if bits == (FULL_BITS,):
            return x
        if mode == "full" and not self.is_initializing():
            return x  # needs no quantization state: a plain network, a teacher for example
        positive = POSITIVE_STEPS[self.settings.positive_step]
        stored = self.variable("quant", "act_step", lambda: positive.raw(jnp.ones(len(bits))))
        if len(bits) > 1:
            logits = self.variable("quant", "logits", self._init_logits)

        def branch(index: jax.Array | int, width: jax.Array | int) -> jax.Array:
            step = positive.step(stored.value)[index]
            return fake_quant(x, step, width, signed=self.signed, shift=self.shift)

        if mode == "full":
            return x
        if mode in ("calibrate", "calibrate_lowest"):
            rule = self.settings.init_rule
            steps = [init_step(x, b, signed=self.signed, shift=self.shift, rule=rule) for b in bits]
            stored.value = positive.raw(jnp.stack(steps))
            lowest = bits.index(min(bits))
            return x if mode == "calibrate" else branch(lowest, bits[lowest])
        if len(bits) == 1:
            return branch(0, bits[0])
        if mode == "mixture":
            share = jax.nn.softmax(logits.value)
            return sum(share[i] * branch(i, width) for i, width in enumerate(bits))
        if mode == "chosen":
            index = precision.branches["/".join(self.path)]
            return branch(index, jnp.asarray(bits, jnp.int32)[index])
        return branch(mode, bits[mode])

    def _init_logits(self) -> jax.Array:
        key = self.make_rng("quant")
        return LOGIT_INIT_SCALE * jax.random.normal(key, (len(self.settings.act_bits),))

    def _quantize_kernel(self, kernel: jax.Array, precision: Precision) -> jax.Array:
        bits = self.settings.weight_bits
        if precision.weights == "full" and not self.is_initializing():
            return kernel
        positive = POSITIVE_STEPS[self.settings.positive_step]
        stored = self.variable(
            "quant", "weight_step", lambda: positive.raw(jnp.ones(self.features))
        )
        if precision.weights == "full":
            return kernel
        if precision.weights == "calibrate":
            stored.value = positive.raw(init_step(kernel, bits, signed=True, per_channel=True))
        return fake_quant(kernel, positive.step(stored.value), bits, signed=True)

    def _record_cost(self, x: jax.Array, macs: int) -> None:
        if self.is_initializing():
            cost = LayerCost(
                macs=macs,
                act_elements=math.prod(x.shape[1:]),
                act_bits=self.settings.act_bits,
                weight_bits=self.settings.weight_bits,
            )
            self.variable("costs", "cost", lambda: cost)

    def _add_bias(self, y: jax.Array) -> jax.Array:
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class QuantConv(_QuantLayer):
    """2-D convolution, [n, h, w, c] -> [n, h', w', features].

    The kernel is [kernel_size, kernel_size, c / groups, features].

    padding: "torch" pads (k - 1) // 2 on every side; "tf" is TensorFlow's SAME.
    """

    kernel_size: int = 3
    stride: int = 1
    groups: int = 1
    padding: str = "torch"

    @nn.compact
    def __call__(self, x: jax.Array, precision: Precision = FULL) -> jax.Array:
        """Convolves the quantized input with the quantized kernel."""
        k, channels = self.kernel_size, x.shape[-1]
        shape = (k, k, channels // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        inputs = self._quantize_input(x, precision)
        kernel = self._quantize_kernel(kernel, precision)
        padding = tuple(_padding(size, k, self.stride, self.padding) for size in x.shape[1:3])
        if self.groups == channels == self.features:
            y = depthwise_conv(inputs, kernel, self.stride, padding)
        else:
            y = jax.lax.conv_general_dilated(
                inputs,
                kernel,
                window_strides=(self.stride, self.stride),
                padding=padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )
        self._record_cost(x, macs=math.prod(y.shape[1:3]) * math.prod(shape))
        return self._add_bias(y)


def _padding(size: int, kernel_size: int, stride: int, kind: str) -> tuple[int, int]:
    if kind == "torch":
        return (kernel_size - 1) // 2, (kernel_size - 1) // 2
    total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


class QuantDense(_QuantLayer):
    """Dense layer, [n, c] -> [n, features], kernel [c, features]."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, precision: Precision = FULL) -> jax.Array:
        """Multiplies the quantized input with the quantized kernel."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        y = self._quantize_input(x, precision) @ self._quantize_kernel(kernel, precision)
        self._record_cost(x, macs=math.prod(shape))
        return self._add_bias(y)
