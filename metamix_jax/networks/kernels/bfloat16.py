"""Products of bfloat16 operands with float32 accumulation (config.compute_dtype), for matrix units.

Operands quantized at a single width are multiplied as integer levels, which bfloat16 represents
exactly up to 256, and scaled afterwards: the product is exact while float32 accumulation is, up to
2^24. Other operands (full-precision weights and images, mixtures of widths) are rounded to
bfloat16's 8-bit significand. The backward products also run in bfloat16, on rounded cotangents.

This is native on TPU. On GPUs the float32 sums of a convolution are rounded to bfloat16 when they
leave the matrix units (convolution.py); those of dense layers are not.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metamix_jax.networks.quantizers import along_last_axis, integer_levels

DTYPE = jnp.bfloat16


class Operand(NamedTuple):
    """An operand of a layer's product: real = levels * step - shift.

    real: float32; receives the gradient.
    levels: integers as float32, same shape; None: not decomposed.
    step: real units per level, broadcasts against `real`.
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
    """Returns the operand `real`, the fake_quant of the other arguments, with its levels."""
    levels = integer_levels(x, step, bits, signed=signed, shift=shift)
    return Operand(real, levels, along_last_axis(step, x.ndim), shift)


def product(multiply: Callable[..., jax.Array], x: Operand, kernel: Operand) -> jax.Array:
    """Returns multiply(x.real, kernel.real) in float32, computed as the module describes.

    Gradients flow only to the two `real`, and from there to the step sizes through `fake_quant`:
    through levels and steps they would be differences of large sums, dominated by rounding. With
    levels, only first-order gradients are supported.

    Args:
      multiply: bilinear, for any floating dtype; takes `preferred_element_type`.
      x: [n, ...], with a scalar step.
      kernel: [..., features], without shift; its step's last axis is the result's.
    """

    @jax.custom_vjp
    def run(*arguments: jax.Array) -> jax.Array:
        return forward(*arguments)[0]

    ones_shape = 1, *x.real.shape[1:]

    def of_ones(levels: jax.Array) -> jax.Array:
        # The contribution of a unit shift, which excludes the zero padding.
        return multiply(jnp.ones(ones_shape, jnp.float32), levels.astype(jnp.float32))

    def forward(x_real, kernel_real, x_levels, kernel_levels, x_step, kernel_step):
        operands = x_levels.astype(DTYPE), kernel_levels.astype(DTYPE)
        y = multiply(*operands, preferred_element_type=jnp.float32) * x_step
        if x.shift:
            y = y - x.shift * of_ones(operands[1])
        return y * kernel_step, (*operands, x_step, kernel_step)

    def backward(residuals, cotangent):
        x_levels, kernel_levels, x_step, kernel_step = residuals
        cotangent = (cotangent * kernel_step).astype(DTYPE)
        grads = jax.vjp(multiply, x_levels, kernel_levels)[1](cotangent)
        x_grad, kernel_grad = (each.astype(jnp.float32) for each in grads)
        kernel_grad = kernel_grad * x_step
        if x.shift:
            total = cotangent.astype(jnp.float32).sum(axis=0, keepdims=True)
            of_shift = jax.vjp(of_ones, kernel_levels.astype(jnp.float32))[1](total)[0]
            kernel_grad = kernel_grad - x.shift * of_shift
        return x_grad, kernel_grad / kernel_step, None, None, None, None

    run.defvjp(forward, backward)
    levels = (each.real if each.levels is None else each.levels for each in (x, kernel))
    return run(x.real, kernel.real, *levels, x.step, kernel.step)
