"""LSQ fake quantization (Esser et al., ICLR 2020) as small pure functions.

An integer level q in [low, high] represents the real value q * step - shift. Gradients come from
autodiff through a clip and a straight-through round, which gives LSQ's gradients for the input and
the step, except on exact ties with a clip bound.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

STEP_FLOOR = 1e-6  # smallest step size, in real units per level
MSE_ELEMENTS = 2**20  # maximum number of evenly spaced elements used by the "mse" rule
MSE_TRIES = 48  # candidate steps, each 2^(1/8) times smaller than the previous one


def round_ste(x: jax.Array) -> jax.Array:
    """Rounds half to even with a straight-through gradient."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def scale_gradient(x: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Returns `x` unchanged, bit for bit, with its gradient multiplied by `scale`.

    The common idiom `x * scale + stop_gradient(x - x * scale)` changes some values by an ulp,
    which moves numbers across rounding boundaries.
    """
    fixed = jax.lax.stop_gradient(x)
    return fixed + scale * (x - fixed)


def int_range(bits: jax.Array | int, signed: bool) -> tuple[jax.Array | int, jax.Array | int]:
    """Returns the lowest and highest level: 0, 2^b - 1; signed: -(2^(b-1) - 1), 2^(b-1) - 1."""
    if signed:
        high = (1 << (bits - 1)) - 1
        return -high, high
    return 0 * bits, (1 << bits) - 1


def fake_quant(
    x: jax.Array, step: jax.Array, bits: jax.Array | int, *, signed: bool, shift: float = 0.0
) -> jax.Array:
    """Rounds `x` to the nearest level of a `bits`-wide quantizer (LSQ, Eq. 1 and 2).

    Args:
      x: any shape, real units.
      step: positive step size, real units per level; a scalar, or [x.shape[-1]] per channel.
      bits: bit-width; may be traced, so that one compiled network serves every policy.
      signed: symmetric levels around 0 instead of levels from 0 up.
      shift: added before and subtracted after quantization, real units; 3/8 makes hswish outputs
        non-negative.
    """
    low, high = _bounds(x, bits, signed)
    # LSQ scales the step's gradient by 1 / sqrt(N * Qp), with N the number of quantized elements.
    step = scale_gradient(step, jax.lax.rsqrt(x.size * high))
    step = along_last_axis(step, x.ndim)
    return round_ste(_clipped(x, step, low, high, shift)) * step - shift


def integer_levels(
    x: jax.Array, step: jax.Array, bits: jax.Array | int, *, signed: bool, shift: float = 0.0
) -> jax.Array:
    """Returns the integer levels of `fake_quant`, in the dtype of `x`, without a gradient.

    fake_quant(...) = integer_levels(...) * step - shift; the arguments are the same.
    """
    step = along_last_axis(step, x.ndim)
    levels = jnp.round(_clipped(x, step, *_bounds(x, bits, signed), shift))
    return jax.lax.stop_gradient(levels)


def _bounds(x: jax.Array, bits: jax.Array | int, signed: bool) -> tuple[jax.Array, jax.Array]:
    low, high = int_range(bits, signed)
    return jnp.asarray(low, x.dtype), jnp.asarray(high, x.dtype)


def _clipped(
    x: jax.Array, step: jax.Array, low: jax.Array, high: jax.Array, shift: float
) -> jax.Array:
    return jnp.clip((x + shift) / step, low, high)


def init_step(
    x: jax.Array,
    bits: int,
    *,
    signed: bool,
    shift: float = 0.0,
    rule: str = "shifted",
    per_channel: bool = False,
) -> jax.Array:
    """Returns an initial step size for the data, at least STEP_FLOOR.

    LSQ uses 2 * mean|x| / sqrt(Qp): suitable before training, but for bell-shaped data at 8 bits
    about five times the optimal step.

    Args:
      x: the data to be quantized, real units.
      bits: bit-width.
      signed: as in `fake_quant`.
      shift: as in `fake_quant`.
      rule: "shifted" is LSQ's, of |x + shift|; "unshifted" uses |x| and Qp = 2^bits - 1 even if
        signed (a variant in published code); "mse" minimizes the squared error, for calibration
        without training.
      per_channel: one step per index of the last axis, [x.shape[-1]], instead of a scalar.
    """
    if rule == "mse":
        return _least_error_step(x + shift, bits, signed=signed, per_channel=per_channel)
    if rule == "unshifted":
        size, high = jnp.abs(x), (1 << bits) - 1
    else:
        size, high = jnp.abs(x + shift), int_range(bits, signed)[1]
    axes = tuple(range(x.ndim - 1)) if per_channel else None
    return jnp.maximum(2.0 * jnp.mean(size, axis=axes) / high**0.5, STEP_FLOOR)


def _least_error_step(x: jax.Array, bits: int, *, signed: bool, per_channel: bool) -> jax.Array:
    """Returns the best of MSE_TRIES steps, descending from the smallest that clips nothing."""
    rows = x.reshape(-1, x.shape[-1]) if per_channel else x.reshape(-1, 1)
    rows = rows[:: max(1, rows.size // MSE_ELEMENTS)]
    widest = jnp.max(jnp.abs(rows), axis=0) / int_range(bits, signed)[1]
    tries = jnp.maximum(widest[None] * 2.0 ** (-jnp.arange(MSE_TRIES)[:, None] / 8), STEP_FLOOR)

    def error(steps: jax.Array) -> jax.Array:
        return jnp.mean((fake_quant(rows, steps, bits, signed=signed) - rows) ** 2, axis=0)

    best = jnp.argmin(jax.lax.map(error, tries), axis=0)
    steps = jnp.take_along_axis(tries, best[None], axis=0)[0]
    return steps if per_channel else steps[0]


class PositiveStep(NamedTuple):
    """A map from a stored, unconstrained parameter to a positive step size, and its inverse."""

    step: Callable[[jax.Array], jax.Array]
    raw: Callable[[jax.Array], jax.Array]


def _floor_straight_through(raw: jax.Array) -> jax.Array:
    # The gradient passes below the floor too, so that the step can recover.
    fixed = jax.lax.stop_gradient(raw)
    return jnp.maximum(fixed, STEP_FLOOR) + (raw - fixed)


POSITIVE_STEPS = {
    "floor": PositiveStep(_floor_straight_through, lambda step: step),
    "abs": PositiveStep(lambda raw: jnp.maximum(jnp.abs(raw), STEP_FLOOR), lambda step: step),
    "softplus": PositiveStep(
        lambda raw: jnp.maximum(jax.nn.softplus(raw), STEP_FLOOR),
        lambda step: step + jnp.log(-jnp.expm1(-step)),
    ),
}


def along_last_axis(step: jax.Array, ndim: int) -> jax.Array:
    """Returns a scalar step unchanged and a per-channel step reshaped to `ndim` axes."""
    return step.reshape((1,) * (ndim - 1) + (-1,)) if step.ndim else step
