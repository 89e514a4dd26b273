"""Convolution with a CPU-specific implementation.

On CPU, XLA (as of jaxlib 0.10) loses half its time around convolutions: it recomputes a layer's
input elementwise inside the transpose needed for the kernel's gradient, runs narrow convolutions
(16 channels) at half the speed of wide ones, and dilates the cotangent with zeros for the input's
gradient at stride 2. The CPU implementation avoids all three; it performs the same arithmetic in
another order. Accelerators use XLA's convolution.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from metamix_jax.networks.kernels.depthwise import Padding
from metamix_jax.networks.kernels.xla_cpu import materialised

_FOLDS = (8, 4, 2, 1)


def convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, groups: int = 1
) -> jax.Array:
    """Convolves [n, h, w, c] with [kh, kw, c / groups, features] -> [n, h', w', features]."""
    if groups > 1 or kernel.shape[:2] == (1, 1):  # 1 x 1 is a matrix product
        return plain_convolve(x, kernel, stride, padding, groups)
    return _convolve(x, kernel, stride, padding)


def plain_convolve(
    x: jax.Array,
    kernel: jax.Array,
    stride: int | tuple[int, int],
    padding: Padding,
    groups: int = 1,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """XLA's convolution; shapes as in `convolve`.

    XLA on GPUs has no bfloat16 convolution with a float32 result (it converts the operands to
    float32 first), so there the float32 sums are rounded to bfloat16.
    """

    def product(x: jax.Array, kernel: jax.Array, result: DTypeLike | None) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride) if isinstance(stride, int) else stride,
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            preferred_element_type=result,
        )

    if x.dtype != jnp.bfloat16 or preferred_element_type is None:
        return product(x, kernel, preferred_element_type)

    def rounded(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return product(x, kernel, x.dtype).astype(preferred_element_type)

    wide = functools.partial(product, result=preferred_element_type)
    return jax.lax.platform_dependent(x, kernel, cuda=rounded, rocm=rounded, default=wide)


def _value(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    options = {"stride": stride, "padding": padding}
    ours, plain = (functools.partial(form, **options) for form in (_folded, plain_convolve))
    return jax.lax.platform_dependent(x, kernel, cpu=ours, default=plain)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    (x,) = materialised(x)
    return _value(x, kernel, stride, padding), (x, kernel)


def _backward(
    stride: int, padding: Padding, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    (cotangent,) = materialised(cotangent)
    options = {"stride": stride, "padding": padding}

    def plain(cotangent: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: plain_convolve(x, kernel, **options), x)[1](cotangent)[0]

    ours = functools.partial(_input_grad, **options)
    input_grad = jax.lax.platform_dependent(cotangent, x, kernel, cpu=ours, default=plain)
    return input_grad, *jax.vjp(lambda k: plain_convolve(x, k, **options), kernel)[1](cotangent)


# Forward and backward each select the platform: differentiating platform_dependent traces slowly.
_convolve = jax.custom_vjp(_value, nondiff_argnums=(2, 3))
_convolve.defvjp(_forward, _backward)


def _folded(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Convolves few channels by computing `fold` neighbouring columns as extra features.

    The widened kernel contains zeros, but makes the matrix products wide enough for the CPU.
    """
    _, kernel_width, channels, features = kernel.shape
    width = (x.shape[2] + sum(padding[1]) - kernel_width) // stride + 1
    room = 64 if channels <= 4 else 32 if channels <= 16 else 0
    fold = next(n for n in _FOLDS if n == 1 or (n * features <= room and width % n == 0))
    if kernel_width == 1 or fold == 1:
        return plain_convolve(x, kernel, stride, padding)
    shifts = ((i * stride, (fold - 1 - i) * stride) for i in range(fold))
    edges = [((0, 0, 0), (*shift, 0), (0, 0, 0), (0, 0, 0)) for shift in shifts]
    zero = jnp.zeros((), kernel.dtype)
    wide = jnp.concatenate([jax.lax.pad(kernel, zero, edge) for edge in edges], axis=-1)
    y = plain_convolve(x, wide, (stride, fold * stride), padding)
    return y.reshape(*y.shape[:2], width, features)


def _input_grad(
    cotangent: jax.Array, x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> jax.Array:
    height, width = kernel.shape[:2]
    if stride == 1:
        flipped = kernel[::-1, ::-1].swapaxes(2, 3)
        sides = zip((height, width), padding, strict=True)
        outer = tuple((size - 1 - before, size - 1 - after) for size, (before, after) in sides)
        return _folded(cotangent, flipped, 1, outer)
    if stride == 2 and min(height, width) > 1 and x.shape[1] % 2 == x.shape[2] % 2 == 0:
        return _input_grad_at_stride_2(cotangent, x.shape, kernel, padding)
    return jax.vjp(lambda x: plain_convolve(x, kernel, stride, padding), x)[1](cotangent)[0]


def _input_grad_at_stride_2(
    cotangent: jax.Array, shape: tuple[int, ...], kernel: jax.Array, padding: Padding
) -> jax.Array:
    """Computes even and odd positions as convolutions of the cotangent with every second tap.

    Even and odd columns are features of one convolution, so that they come out interleaved.
    """
    n, height, width, channels = shape
    kernel = kernel.swapaxes(2, 3)
    rows, columns = (
        [_taps(size, before, phase) for phase in (0, 1)]
        for size, (before, _) in zip(kernel.shape[:2], padding, strict=True)
    )
    first, last = min(map(min, columns)), max(map(max, columns))
    none = jnp.zeros_like(kernel[:, 0])
    both = jnp.stack([
        jnp.concatenate([kernel[:, taps[i]] if i in taps else none for taps in columns], axis=-1)
        for i in range(first, last + 1)
    ], axis=1)  # fmt: skip
    parts = []
    for taps in rows:
        sides = (
            (-min(taps), height // 2 + max(taps) - cotangent.shape[1]),
            (-first, width // 2 + last - cotangent.shape[2]),
        )
        window = jnp.stack([both[taps[i]] for i in sorted(taps)])
        parts.append(plain_convolve(cotangent, window, 1, sides))
    return jnp.stack(parts, axis=2).reshape(n, height, width, channels)


def _taps(size: int, before: int, phase: int) -> dict[int, int]:
    """Returns j - i -> tap for the kernel taps that multiply input position 2 i + phase.

    j is the output position, `before` the padding before the input.
    """
    return {
        (phase + before - tap) // 2: tap for tap in range(size) if (phase + before - tap) % 2 == 0
    }
