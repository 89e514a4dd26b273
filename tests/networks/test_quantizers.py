import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamix_jax.networks.quantizers import (
    POSITIVE_STEPS,
    STEP_FLOOR,
    fake_quant,
    init_step,
    int_range,
    integer_levels,
    round_ste,
    scale_gradient,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")

WIDTHS = (2, 3, 4, 8)
SHIFTS = (0.0, 3 / 8)
INF = np.inf
VARIANTS = pytest.mark.parametrize(
    ("bits", "signed", "shift"), list(itertools.product(WIDTHS, (False, True), SHIFTS))
)

LEVELS = [  # bits, signed, input in units of the step, level
    (2, False, (-INF, -9, -0.5, 0.5, 0.75, 1.5, 2.5, 3.5, 4, INF), (0, 0, 0, 0, 1, 2, 2, 3, 3, 3)),
    (2, True, (-INF, -1.5, -0.75, -0.5, 0.5, 0.75, 1.5, INF), (-1, -1, -1, 0, 0, 1, 1, 1)),
    (3, False, (-1, 1.5, 2.5, 4.5, 5.5, 6.5, 7.5, 8), (0, 2, 2, 4, 6, 6, 7, 7)),
    (3, True, (-4, -3.5, -2.5, -1.5, 1.5, 2.5, 3.5, 4), (-3, -3, -2, -2, 2, 2, 3, 3)),
    (4, False, (-3, 0.5, 7.5, 8.5, 14.5, 15.25, 15.5, 99), (0, 0, 8, 8, 14, 15, 15, 15)),
    (4, True, (-8, -7.5, -6.5, -5.5, 5.5, 6.5, 7.5, 8), (-7, -7, -6, -6, 6, 6, 7, 7)),
    (8, False, (-1, 0.5, 127.5, 128.5, 254.5, 255.5, 1e30), (0, 0, 128, 128, 254, 255, 255)),
    (8, True, (-1e30, -127.5, -126.5, 125.5, 127.5, INF), (-127, -127, -126, 126, 127, 127)),
]  # fmt: skip


# Traced bits save compilations; test_traced_bits_equal_static_bits shows they equal static ones.
quantize = jax.jit(fake_quant, static_argnames=("signed", "shift"))


@functools.partial(jax.jit, static_argnames=("signed", "shift"))
def gradients(cotangent, x, step, bits, *, signed, shift=0.0):
    def forward(x, step):
        return fake_quant(x, step, bits, signed=signed, shift=shift)

    return jax.vjp(forward, x, step)[1](cotangent)


def random_input(shape, seed=0, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def levels_of(y, step, shift=0.0):
    return np.rint((np.asarray(y, np.float64) + shift) / step).astype(int)


def bits_equal(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [
        (2, False, (0, 3)), (3, False, (0, 7)), (4, False, (0, 15)), (8, False, (0, 255)),
        (2, True, (-1, 1)), (3, True, (-3, 3)), (4, True, (-7, 7)), (8, True, (-127, 127)),
    ],
)  # fmt: skip
def test_int_range(bits, signed, expected):
    assert int_range(bits, signed) == expected
    traced = jax.jit(lambda width: int_range(width, signed))(jnp.int32(bits))
    assert tuple(map(int, traced)) == expected


@pytest.mark.parametrize(("bits", "signed", "x", "levels"), LEVELS)
def test_levels_are_exact(bits, signed, x, levels):
    step = 0.25  # a power of two: x / step and level * step are exact
    y = fake_quant(jnp.float32(x) * step, jnp.float32(step), bits, signed=signed)
    np.testing.assert_array_equal(y, np.float32(levels) * step)


def test_unit_anchor():
    x = jnp.float32([-0.3, 0.1, 0.26, 0.9, 1.7])
    y, pullback = jax.vjp(lambda x, s: fake_quant(x, s, 3, signed=False), x, jnp.float32(0.2))
    dx, dstep = pullback(jnp.ones_like(y))
    np.testing.assert_array_equal(y, np.float32([0, 0, 1, 4, 7]) * np.float32(0.2))
    np.testing.assert_array_equal(dx, [0, 1, 1, 1, 0])
    np.testing.assert_allclose(dstep, 5.7 / np.sqrt(35), rtol=1e-6)


@VARIANTS
def test_gradients_are_lsqs(bits, signed, shift):
    low, high = int_range(bits, signed)
    step = 1.3 / high**0.5
    x = random_input(4000, seed=bits, scale=0.7 * high * step)
    ratio = (x.astype(np.float64) + shift) / step
    from_tie = np.abs(ratio - np.floor(ratio) - 0.5)
    from_bound = np.minimum(abs(ratio - low), abs(ratio - high))
    keep = (from_tie > 1e-3) & (from_bound > 1e-3)
    assert keep.mean() > 0.9
    below, above = ratio < low, ratio > high
    assert below.any() and above.any() and not (below | above).all()
    slope = np.where(below, low, np.where(above, high, np.rint(ratio) - ratio))
    cotangent = random_input(x.shape, seed=1) * keep

    dx, dstep = gradients(cotangent, x, np.float32(step), bits, signed=signed, shift=shift)
    np.testing.assert_allclose(dx, np.where(below | above, 0, cotangent), rtol=1e-6)
    expected = np.sum(slope * cotangent) / np.sqrt(x.size * high)
    tolerance = 1e-5 * np.abs(slope * cotangent).sum() / np.sqrt(x.size * high)
    np.testing.assert_allclose(dstep, expected, atol=tolerance)


@VARIANTS
def test_every_level_is_hit_and_none_outside(bits, signed, shift):
    low, high = int_range(bits, signed)
    step = np.float32(0.037)
    x = np.linspace((low - 3) * step - shift, (high + 3) * step - shift, 5000, dtype=np.float32)
    y = np.asarray(quantize(x, step, bits, signed=signed, shift=shift))
    levels = levels_of(y, step, shift)
    assert set(levels) == set(range(low, high + 1))
    # Compiled, q * step - shift may be fused into one operation with one rounding.
    tolerance = np.spacing(high * step) if shift else 0
    np.testing.assert_allclose(y, levels.astype(np.float32) * step - shift, rtol=0, atol=tolerance)
    assert (np.diff(y) >= 0).all()


@VARIANTS
def test_idempotent(bits, signed, shift):
    x, steps = random_input(2000), np.float32([0.0123, 0.1, 0.7])
    for step in steps:
        once = quantize(x, step, bits, signed=signed, shift=shift)
        assert bits_equal(once, quantize(once, step, bits, signed=signed, shift=shift))


@VARIANTS
def test_integer_levels_are_fake_quants_without_a_gradient(bits, signed, shift):
    x, steps = random_input((500, 3)), np.float32([0.05, 0.1, 0.7])
    levels, pull = jax.vjp(
        lambda x, step: integer_levels(x, step, bits, signed=signed, shift=shift), x, steps
    )
    low, high = int_range(bits, signed)
    assert set(np.unique(levels)) <= set(range(low, high + 1))
    y = fake_quant(x, steps, bits, signed=signed, shift=shift)
    np.testing.assert_array_equal(y, levels * steps[None] - shift)
    assert not any(np.any(slope) for slope in pull(np.ones_like(x)))


@VARIANTS
def test_fake_quant_is_the_written_out_formula_bit_for_bit(bits, signed, shift):
    def formula(x, step):
        low, high = (jnp.asarray(bound, x.dtype) for bound in int_range(bits, signed))
        step = scale_gradient(step, jax.lax.rsqrt(x.size * high))[None]
        return round_ste(jnp.clip((x + shift) / step, low, high)) * step - shift

    x, steps = random_input((500, 3)), np.float32([0.05, 0.1, 0.7])
    y, pull = jax.vjp(lambda x, s: fake_quant(x, s, bits, signed=signed, shift=shift), x, steps)
    wanted, pull_wanted = jax.vjp(formula, x, steps)
    assert bits_equal(y, wanted)
    slope = random_input(x.shape, seed=1)
    assert all(map(bits_equal, pull(slope), pull_wanted(slope)))


def test_per_channel_steps():
    x, steps = random_input((3, 3, 4, 5)), np.float32([0.05, 0.1, 0.3, 1.0, 3.0])
    y = quantize(x, steps, 4, signed=True)
    _, dsteps = gradients(np.ones_like(x), x, steps, 4, signed=True)
    assert dsteps.shape == (5,)
    for channel, step in enumerate(steps):
        part = np.ascontiguousarray(x[..., channel])
        assert bits_equal(y[..., channel], quantize(part, step, 4, signed=True))
        # N in the gradient scale is the size of the whole kernel, not of the channel.
        expected = gradients(np.ones_like(part), part, step, 4, signed=True)[1] / 5**0.5
        np.testing.assert_allclose(dsteps[channel], expected, rtol=1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_scale_gradient_keeps_every_bit(wrap):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=100_000) * 10.0 ** rng.uniform(-30, 30, 100_000)).astype(np.float32)
    for scale in (1e-4, 0.0213, 0.9, 7.7):
        assert bits_equal(wrap(scale_gradient)(jnp.asarray(x), scale), x)


def test_scale_gradient_scales():
    x = random_input(100)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(scale_gradient(x, 0.25))))(x)
    np.testing.assert_allclose(gradient, 0.25 * np.cos(x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_ste_is_exact(wrap, dtype):
    numbers = [np.linspace(-260, 260, 50_001), np.arange(-256, 256) + 0.5, [1e-30, -1e30]]
    x = jnp.asarray(np.concatenate(numbers), dtype)
    np.testing.assert_array_equal(wrap(round_ste)(x), jnp.round(x))
    np.testing.assert_array_equal(round_ste(jnp.float32([0.5, 1.5, 2.5, -0.5])), [0, 2, 2, 0])


def test_round_ste_passes_the_gradient():
    x = random_input(50)
    gradient = jax.grad(lambda x: jnp.sum(round_ste(x) ** 2))(x)
    np.testing.assert_array_equal(gradient, 2 * np.rint(x))


@pytest.mark.parametrize("signed", [False, True])
def test_traced_bits_equal_static_bits(signed):
    x, step = random_input(5000), np.float32(0.0371)
    traces = []

    def output_and_gradients(x, step, bits):
        traces.append(bits)
        y, pullback = jax.vjp(lambda x, s: fake_quant(x, s, bits, signed=signed), x, step)
        return y, *pullback(x)

    traced = jax.jit(output_and_gradients)
    for bits in WIDTHS:
        static = jax.jit(functools.partial(output_and_gradients, bits=bits))
        y, dx, dstep = traced(x, step, jnp.int32(bits))
        y_static, dx_static, dstep_static = static(x, step)
        assert bits_equal(y, y_static)
        assert bits_equal(dx, dx_static)
        np.testing.assert_allclose(dstep, dstep_static, rtol=1e-5)
    assert len(traces) == 1 + len(WIDTHS)  # one compilation serves every traced width


@pytest.mark.parametrize("bits", WIDTHS)
def test_shifted_quantizer_represents_the_minimum_of_hswish(bits):
    x = jnp.linspace(-4, 4, 2001)
    hswish = x * jnp.clip(x + 3, 0, 6) / 6
    assert hswish.min() == -3 / 8
    y = quantize(hswish, jnp.float32(0.0917), bits, signed=False, shift=3 / 8)
    assert y[jnp.argmin(hswish)] == -3 / 8
    assert y.min() == -3 / 8
    assert quantize(jnp.float32(-5), jnp.float32(0.1), bits, signed=False, shift=3 / 8) == -3 / 8


@VARIANTS
def test_init_step(bits, signed, shift):
    x = random_input((6, 7, 5), seed=bits)
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    options = {"signed": signed, "shift": shift}
    shifted = 2 * np.abs(x + shift).mean() / high**0.5
    unshifted = 2 * np.abs(x).mean() / (2**bits - 1) ** 0.5
    np.testing.assert_allclose(init_step(x, bits, **options), shifted, rtol=1e-5)
    np.testing.assert_allclose(
        init_step(x, bits, rule="unshifted", **options), unshifted, rtol=1e-5
    )
    per_channel = init_step(x, bits, per_channel=True, **options)
    expected = 2 * np.abs(x + shift).mean((0, 1)) / high**0.5
    np.testing.assert_allclose(per_channel, expected, rtol=1e-5)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_step_of_least_squared_error(bits, signed):
    values = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    values = values if signed else np.abs(values)

    def error(step):
        return float(np.mean((fake_quant(values, step, bits, signed=signed) - values) ** 2))

    step = init_step(values, bits, signed=signed, rule="mse")
    least = min(error(step * 2.0**factor) for factor in np.linspace(-3, 3, 97))
    assert error(step) <= 1.05 * least  # candidate steps are an eighth of an octave apart


def test_step_of_least_squared_error_is_exact_on_levels():
    # Only the step itself and its halvings have zero error.
    levels = 0.3 * np.arange(16, dtype=np.float32)
    assert init_step(levels, 4, signed=False, rule="mse") == pytest.approx(0.3, rel=1e-6)
    shifted = init_step(levels - 0.375, 4, signed=False, shift=0.375, rule="mse")
    assert shifted == pytest.approx(0.3, rel=1e-6)
    rows = np.stack([levels, 2 * levels], axis=-1)
    steps = init_step(rows, 4, signed=False, rule="mse", per_channel=True)
    np.testing.assert_allclose(steps, [0.3, 0.6], rtol=1e-6)


def test_init_step_of_zeros_is_the_floor():
    assert init_step(jnp.zeros((4, 4)), 4, signed=False) == np.float32(STEP_FLOOR)
    steps = init_step(jnp.float32([[1, 0], [1, 0]]), 2, signed=True, per_channel=True)
    np.testing.assert_array_equal(steps, np.float32([2, STEP_FLOOR]))


@pytest.mark.parametrize("name", POSITIVE_STEPS)
def test_step_is_at_least_the_floor_for_any_stored_number(name):
    raw = jnp.float32([-1e6, -1000, -100, -20, -5, -1, -0.3, -1e-3, -1e-8, 0, 1e-8, 1e-3, 1, 1000])
    for compute in (POSITIVE_STEPS[name].step, jax.jit(POSITIVE_STEPS[name].step)):
        step = np.asarray(compute(raw))
        assert (step >= np.float32(STEP_FLOOR)).all(), dict(zip(raw.tolist(), step, strict=True))


@pytest.mark.parametrize("name", POSITIVE_STEPS)
def test_stored_number_of_a_step_gives_it_back(name):
    positive = POSITIVE_STEPS[name]
    steps = jnp.logspace(-5, 2, 300)
    np.testing.assert_allclose(positive.step(positive.raw(steps)), steps, rtol=2e-5)


def test_floors_gradient_passes_below_the_floor():
    raw = jnp.float32([-1000, -1, -1e-3, 0, 1e-8, 0.1, 3])
    gradient = jax.grad(lambda raw: jnp.sum(POSITIVE_STEPS["floor"].step(raw)))(raw)
    np.testing.assert_array_equal(gradient, 1)
