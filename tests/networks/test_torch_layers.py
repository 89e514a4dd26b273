"""Layers as PyTorch has them, against its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamix_jax.networks.torch_layers import conv
from tests.helpers.layer_reference import reference_conv


@pytest.mark.parametrize("padding", ["torch", "tf"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_convolutions_are_padded_as_there(size, stride, groups, padding):
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 4))
    layer = conv(8, size, stride, groups, padding)
    kernel = jax.random.normal(jax.random.key(1), (size, size, 4 // groups, 8))
    found = layer.apply({"params": {"kernel": kernel}}, x)
    wanted = reference_conv(np.asarray(x), np.asarray(kernel), stride, groups, padding)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_bias_is_added_where_it_is_asked_for():
    x, key = jnp.ones((1, 3, 3, 2)), jax.random.key(0)
    assert conv(4).init(key, x)["params"].keys() == {"kernel"}
    assert conv(4, use_bias=True).init(key, x)["params"].keys() == {"kernel", "bias"}
