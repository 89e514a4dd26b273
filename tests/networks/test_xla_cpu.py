import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamix_jax.networks.kernels.convolution import convolve
from metamix_jax.networks.kernels.xla_cpu import keeping_arguments, materialised
from metamix_jax.networks.quantizers import fake_quant

X = jax.random.normal(jax.random.key(0), (8, 32, 32, 16))


def test_what_is_materialised_keeps_value_and_gradient():
    x, step = jax.jit(materialised)(X, jnp.float32(2))
    np.testing.assert_array_equal(x, X)
    assert step == 2
    gradient = jax.grad(lambda x: (materialised(x)[0] ** 2).sum())(X)
    np.testing.assert_array_equal(gradient, 2 * X)


@pytest.mark.parametrize("bits", [2, 8])
def test_a_quantizer_that_keeps_its_arguments_has_the_same_gradients(bits):
    def quantize(x, step, bits):
        return fake_quant(x, step, bits, signed=True)

    def gradients(form):
        def loss(x, step):
            return (form(x, step, jnp.int32(bits)) * jnp.cos(x)).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(X, jnp.float32(0.1))

    found, wanted = gradients(keeping_arguments(quantize)), gradients(quantize)
    for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_less_is_kept_for_the_gradient_of_a_step():
    kernel = jnp.ones((3, 3, 16, 16))

    def quantize(x, step, bits):
        return fake_quant(x, step, bits, signed=False)

    def temporary_bytes(form):
        def loss(kernel, steps):
            x = X
            for step in steps:
                x = form(jax.nn.relu(x), step, jnp.int32(4))
                x = convolve(x, kernel, 1, ((1, 1), (1, 1)))
            return (x**2).sum()

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        program = gradient.lower(kernel, [jnp.float32(0.1)] * 6).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(keeping_arguments(quantize)) < 0.8 * temporary_bytes(quantize)
