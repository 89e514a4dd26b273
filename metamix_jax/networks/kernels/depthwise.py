"""Depthwise convolution with a CPU-specific implementation.

XLA's grouped convolution is slow on CPU, especially its gradients (a training step of MobileNet-v2
takes minutes). On CPU this sums shifted, strided slices of the input instead: the same arithmetic
in another order. Accelerators use XLA's convolution.
"""

import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]  # (before, after) of height and width


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Convolves each channel with its own filter: [n, h, w, c] -> [n, h', w', c].

    The kernel is [kh, kw, 1, c].
    """

    def grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride),
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )

    def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return shifted_slices(x, kernel, stride, padding)

    return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=grouped)


def shifted_slices(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Depthwise convolution as a sum over kernel positions; shapes as in `depthwise_conv`."""
    kernel_height, kernel_width, _, channels = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, padded_height, padded_width, _ = x.shape
    height = (padded_height - kernel_height) // stride + 1
    width = (padded_width - kernel_width) // stride + 1
    total = jnp.zeros((batch, height, width, channels), x.dtype)
    for i in range(kernel_height):
        for j in range(kernel_width):
            stop = (batch, i + (height - 1) * stride + 1, j + (width - 1) * stride + 1, channels)
            window = jax.lax.slice(x, (0, i, j, 0), stop, (1, stride, stride, 1))
            total += window * kernel[i, j].reshape(1, 1, 1, channels)
    return total
