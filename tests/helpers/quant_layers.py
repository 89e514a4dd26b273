"""A convolution and a dense layer by themselves, with the quantizers of networks/layers.py."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from metamix_jax.networks.kernels.convolution import convolve, plain_convolve
from metamix_jax.networks.kernels.depthwise import depthwise_conv
from metamix_jax.networks.layers import QuantProduct
from metamix_jax.networks.precision import FULL, Precision, QuantSettings

HSWISH_SHIFT = 3 / 8  # minus the minimum of hswish


class _Layer(nn.Module):
    features: int
    settings: QuantSettings
    signed: bool = False
    shift: float = 0.0
    use_bias: bool = False

    def run(
        self,
        x: jax.Array,
        kernel: jax.Array,
        precision: Precision,
        multiply: Callable[..., jax.Array],
    ) -> jax.Array:
        shape = jax.eval_shape(multiply, x, kernel).shape
        product = QuantProduct(
            self.settings,
            self.signed,
            self.shift,
            macs=math.prod(shape[1:-1]) * kernel.size,
            act_elements=math.prod(x.shape[1:]),
            parent=self.scope,
        )
        y = product(x, kernel, precision, multiply)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            y += bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class QuantConv(_Layer):
    """2-D convolution, kernel [kernel_size, kernel_size, c / groups, features]."""

    kernel_size: int = 3
    stride: int = 1
    groups: int = 1
    padding: str = "torch"

    @nn.compact
    def __call__(self, x: jax.Array, precision: Precision = FULL) -> jax.Array:
        size, channels = self.kernel_size, x.shape[-1]
        shape = (size, size, channels // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        padding = tuple(
            side_padding(side, size, self.stride, self.padding) for side in x.shape[1:3]
        )

        def multiply(inputs, kernel, preferred_element_type=None):
            if inputs.dtype == jnp.bfloat16:  # meant for accelerators
                options = self.stride, padding, self.groups, preferred_element_type
                return plain_convolve(inputs, kernel, *options)
            if self.groups == channels == self.features:
                return depthwise_conv(inputs, kernel, self.stride, padding)
            return convolve(inputs, kernel, self.stride, padding, self.groups)

        return self.run(x, kernel, precision, multiply)


class QuantDense(_Layer):
    """Dense layer, kernel [c, features]."""

    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, precision: Precision = FULL) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return self.run(x, kernel, precision, jnp.matmul)


class LayeredResNet(nn.Module):
    """The CIFAR ResNet of depth 8 and width 4, made of layers by themselves."""

    settings: QuantSettings
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, precision: Precision = FULL) -> jax.Array:
        def norm(name):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)

        x = QuantConv(4, self.settings.stem(), signed=True, name="conv1")(x, precision)
        x = nn.relu(norm("bn1")(x))
        for stage in range(3):
            features, stride = 4 * 2**stage, 2 if stage else 1
            name = f"layer{stage + 1}_0"
            x = _Block(features, stride, self.settings, name=name)(x, train, precision)
        last = QuantDense(self.num_classes, self.settings.ends(), name="fc")
        return last(jnp.mean(x, axis=(1, 2)), precision)


class _Block(nn.Module):
    features: int
    stride: int
    settings: QuantSettings

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, precision: Precision) -> jax.Array:
        def norm(name):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)

        first = QuantConv(self.features, self.settings, stride=self.stride, name="conv1")
        y = nn.relu(norm("bn1")(first(x, precision)))
        second = QuantConv(self.features, self.settings, name="conv2")
        y = norm("bn2")(second(y, precision))
        if x.shape != y.shape:
            extra = self.features - x.shape[-1]
            x = x[:, :: self.stride, :: self.stride]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
        return nn.relu(x + y)


def side_padding(size: int, kernel_size: int, stride: int, kind: str) -> tuple[int, int]:
    """Returns the zero padding before and after an axis of length `size`."""
    if kind == "torch":
        return (kernel_size - 1) // 2, (kernel_size - 1) // 2
    total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2
