"""Quantization state as exported: step sizes in real units, kernels as integers."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from metamix_jax.exporters.graph import Kernel
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.networks.quantizers import POSITIVE_STEPS, fake_quant


def step_sizes(settings: QuantSettings, stored: Any) -> np.ndarray:
    """Returns step sizes in real units, float32 of the same shape as they are stored in."""
    return np.asarray(POSITIVE_STEPS[settings.positive_step].step(jnp.asarray(stored)), np.float32)


def integer_kernel(
    settings: QuantSettings, kernel: Any, stored: Any, bits: int, *, values: bool = True
) -> Kernel:
    """Returns a kernel's levels at one of its widths.

    Args:
      settings: of its layer.
      kernel: real units, [..., features].
      stored: its step sizes, [widths, features].
      bits: the width.
      values: without, the levels are 0, for checks that need the shape alone.
    """
    step = step_sizes(settings, stored)[settings.weight_bits.index(bits)]
    if not values:
        return Kernel(bits, np.zeros(kernel.shape, np.int8), step)
    # With JAX, whose division differs from NumPy's in the last digit: hundreds of weights decoded
    # from integers are on rounding boundaries.
    real = fake_quant(jnp.asarray(kernel), jnp.asarray(step), bits, signed=True)
    return Kernel(bits, np.rint(np.asarray(real) / step).astype(np.int8), step)
