import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamix_jax.networks.kernels.depthwise import depthwise_conv, shifted_slices

CASES = [
    (3, 1, ((1, 1), (1, 1))),
    (3, 2, ((1, 1), (1, 1))),
    (3, 2, ((0, 1), (0, 1))),  # TensorFlow's SAME at stride 2
    (5, 1, ((2, 2), (2, 2))),
    (5, 2, ((2, 2), (1, 2))),
    (1, 1, ((0, 0), (0, 0))),
]


def grouped(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@pytest.mark.parametrize(("size", "stride", "padding"), CASES)
@pytest.mark.parametrize("form", [depthwise_conv, shifted_slices])
def test_equals_the_grouped_convolution_in_value_and_gradients(form, size, stride, padding):
    x = jax.random.normal(jax.random.key(0), (2, 9, 10, 6))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 1, 6))
    ours, pull_ours = jax.vjp(lambda *args: form(*args, stride, padding), x, kernel)
    plain, pull_plain = jax.vjp(lambda *args: grouped(*args, stride, padding), x, kernel)
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    cotangent = jax.random.normal(jax.random.key(2), ours.shape)
    for got, wanted in zip(pull_ours(cotangent), pull_plain(cotangent), strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-5)


def test_form_is_chosen_by_platform():
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4))
    lower = jax.jit(lambda x, kernel: depthwise_conv(x, kernel, 1, ((1, 1), (1, 1)))).trace
    texts = {
        platform: lower(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    counts = {platform: text.count("stablehlo.convolution") for platform, text in texts.items()}
    assert counts == {"cpu": 0, "cuda": 1, "tpu": 1}
