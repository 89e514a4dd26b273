"""Products on bfloat16 operands with float32 sums (config.compute_dtype), for tensor cores.

What is quantized at one width is multiplied as integer levels, which bfloat16 holds exactly up to
256, and scaled afterwards: such a product is exact as long as float32 sums are, up to 2^24. What is
not (weights and images at full precision, mixtures of widths) is rounded to 8 bits of mantissa.
The gradient's products run on bfloat16 too, of cotangents rounded so.

TPUs multiply so. XLA for NVIDIA GPUs, by its source (not run here), has no convolution of bfloat16
with a float32 result and widens the operands of the forward one, which changes no number; dense
layers and the gradient's convolutions stay bfloat16 there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metamix_jax.networks.quantizers import along_last_axis, integer_levels

DTYPE = jnp.bfloat16


class Operand(NamedTuple):
    """What a layer multiplies: real = levels * step - shift.

    real: float32; takes the gradient.
    levels: float32 whole numbers of the same shape; None: not taken apart.
    step: of the levels, real units, broadcasts against `real`.
    shift: real units.
    """

    real: jax.Array
    levels: jax.Array | None = None
    step: jax.Array | float = 1.0
    shift: float = 0.0


def take_apart(
    real: jax.Array,
    x: jax.Array,
    step: jax.Array,
    bits: jax.Array | int,
    *,
    signed: bool,
    shift: float = 0.0,
) -> Operand:
    """Returns `real`, which is fake_quant of the other arguments, with its levels."""
    levels = integer_levels(x, step, bits, signed=signed, shift=shift)
    return Operand(real, levels, along_last_axis(step, x.ndim), shift)


def product(multiply: Callable[..., jax.Array], x: Operand, kernel: Operand) -> jax.Array:
    """Returns multiply(x.real, kernel.real) as the module describes it, in float32.

    Gradients go to both `real` alone, and from there to step sizes as `fake_quant` has it: through
    levels and steps they would be differences of large sums, which rounding drowns. They are of
    first order where there are levels.

    Args:
      multiply: bilinear, in any floating type; takes `preferred_element_type`.
      x: [n, ...], its step a scalar.
      kernel: [..., features], without shift; its step's last axis is that of the result.
    """

    @jax.custom_vjp
    def run(*arguments: jax.Array) -> jax.Array:
        return forward(*arguments)[0]

    places = 1, *x.real.shape[1:]

    def of_places(levels: jax.Array) -> jax.Array:
        # What a shift of 1 adds: nothing where the input is padded with zeros.
        return multiply(jnp.ones(places, jnp.float32), levels.astype(jnp.float32))

    def forward(x_real, kernel_real, x_levels, kernel_levels, x_step, kernel_step):
        operands = x_levels.astype(DTYPE), kernel_levels.astype(DTYPE)
        y = multiply(*operands, preferred_element_type=jnp.float32) * x_step
        if x.shift:
            y = y - x.shift * of_places(operands[1])
        return y * kernel_step, (*operands, x_step, kernel_step)

    def backward(residuals, slope):
        x_levels, kernel_levels, x_step, kernel_step = residuals
        slope = (slope * kernel_step).astype(DTYPE)
        slopes = jax.vjp(multiply, x_levels, kernel_levels)[1](slope)
        x_slope, kernel_slope = (each.astype(jnp.float32) for each in slopes)
        kernel_slope = kernel_slope * x_step
        if x.shift:
            total = slope.astype(jnp.float32).sum(axis=0, keepdims=True)
            of_shift = jax.vjp(of_places, kernel_levels.astype(jnp.float32))[1](total)[0]
            kernel_slope = kernel_slope - x.shift * of_shift
        return x_slope, kernel_slope / kernel_step, None, None, None, None

    run.defvjp(forward, backward)
    levels = (each.real if each.levels is None else each.levels for each in (x, kernel))
    return run(x.real, kernel.real, *levels, x.step, kernel.step)
