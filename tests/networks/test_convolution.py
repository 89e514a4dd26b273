import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamix_jax.networks.kernels.convolution import convolve, plain_convolve
from tests.helpers.tiny_network import compiled

SAME = ((1, 1), (1, 1))
# Size of kernel, stride, padding, height, width, channels, features.
CASES = [
    (3, 1, SAME, 8, 8, 16, 16),  # folded to two columns of 32 features, also in gradients
    (3, 1, SAME, 8, 8, 3, 16),  # folded to four columns of 64
    (3, 1, SAME, 9, 9, 3, 16),  # an odd width cannot be folded
    (3, 1, SAME, 6, 10, 32, 40),
    (3, 2, SAME, 8, 12, 16, 32),
    (3, 2, ((0, 1), (0, 1)), 8, 8, 3, 16),  # TensorFlow's SAME at stride 2
    (3, 2, SAME, 9, 8, 5, 7),
    (5, 2, ((2, 2), (1, 2)), 8, 10, 5, 7),
    (7, 2, ((3, 3), (3, 3)), 12, 12, 3, 8),
    (2, 2, ((0, 0), (0, 0)), 8, 8, 6, 7),
    (1, 1, ((0, 0), (0, 0)), 8, 8, 8, 8),
    (1, 2, ((0, 0), (0, 0)), 8, 8, 8, 8),
]


def arrays(size, height, width, channels, features):
    x = jax.random.normal(jax.random.key(0), (2, height, width, channels))
    return x, jax.random.normal(jax.random.key(1), (size, size, channels, features))


@pytest.mark.parametrize(
    ("size", "stride", "padding", "height", "width", "channels", "features"), CASES
)
def test_equals_the_plain_convolution_in_value_and_gradients(
    size, stride, padding, height, width, channels, features
):
    inputs = arrays(size, height, width, channels, features)

    @compiled
    def both(x, kernel):
        found = []
        for form in (convolve, plain_convolve):
            y, pull = jax.vjp(lambda *args, form=form: form(*args, stride, padding), x, kernel)
            found.append((y, *pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape))))
        return found

    for ours, plain in zip(*both(*inputs), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4)


def test_curvature_is_that_of_the_plain_convolution():
    inputs = arrays(3, 8, 8, 3, 16)

    def product(form):
        grads = jax.grad(lambda x, kernel: (form(x, kernel, 1, SAME) ** 3).mean(), argnums=(0, 1))
        return jax.jit(lambda *inputs: jax.jvp(grads, inputs, inputs)[1])(*inputs)

    for got, wanted in zip(product(convolve), product(plain_convolve), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_form_is_chosen_by_platform():
    inputs = arrays(3, 8, 8, 16, 16)
    traced = jax.jit(lambda x, kernel: convolve(x, kernel, 1, SAME)).trace(*inputs)
    strides = {
        platform: re.findall(
            r"stride = (\[\d, \d\])", traced.lower(lowering_platforms=(platform,)).as_text()
        )
        for platform in ("cpu", "cuda", "tpu")
    }
    assert strides == {"cpu": ["[1, 2]"], "cuda": ["[1, 1]"], "tpu": ["[1, 1]"]}


def test_the_transposed_input_is_not_computed_again():
    """The purpose of the CPU form: fusions with a transpose do not recompute the input."""

    def loss(kernel, x):
        y = jax.nn.relu(x * 2.0 + 1.0)
        return (convolve(y, kernel, 1, SAME) ** 2).sum()

    x, kernel = arrays(3, 32, 32, 16, 16)
    program = jax.jit(jax.grad(loss)).lower(kernel, x).compile().as_text()
    bodies = re.findall(r"^%\S*fused_computation\S* .*?^}", program, re.MULTILINE | re.DOTALL)
    transposing = [body for body in bodies if " transpose(" in body]
    assert transposing and not any("maximum(" in body for body in transposing)
