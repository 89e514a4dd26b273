"""ResNets with post-activation basic blocks: the CIFAR family and ResNet-18 (He et al., 2016).

Module names follow PyTorch's, so that weight files map by name (pretrained.py).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from metamix_jax.layers import FULL, Precision, QuantConv, QuantDense, QuantSettings

BN_MOMENTUM = 0.9


def _batch_norm(name: str, train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, momentum=BN_MOMENTUM, epsilon=1e-5, name=name
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, [n, h, w, c] -> [n, h / stride, w / stride, features].

    shortcut, where shapes differ: "conv" is a quantized, searched 1x1 convolution; "identity"
    subsamples and pads channels with zeros (option A of the paper).
    """

    features: int
    stride: int
    shortcut: str
    settings: QuantSettings

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, precision: Precision) -> jax.Array:
        """Runs the block."""

        def conv(name: str, stride: int = 1, kernel_size: int = 3) -> QuantConv:
            return QuantConv(
                self.features, self.settings, kernel_size=kernel_size, stride=stride, name=name
            )

        y = conv("conv1", self.stride)(x, precision)
        y = nn.relu(_batch_norm("bn1", train)(y))
        y = conv("conv2")(y, precision)
        y = _batch_norm("bn2", train)(y)
        if x.shape != y.shape:
            if self.shortcut == "conv":
                x = conv("downsample_conv", self.stride, kernel_size=1)(x, precision)
                x = _batch_norm("downsample_bn", train)(x)
            else:
                extra = self.features - x.shape[-1]
                x = x[:, :: self.stride, :: self.stride]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
        return nn.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet for small images: a 3x3 stem and 3 stages of (depth - 2) / 6 blocks."""

    bn_momentum: ClassVar[float] = BN_MOMENTUM
    num_classes: int
    settings: QuantSettings
    depth: int = 20
    width: int = 16  # channels of the first stage; doubled twice
    shortcut: str = "identity"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, precision: Precision = FULL) -> jax.Array:
        """Returns class scores [n, num_classes] of normalised images [n, h, w, c]."""
        ends = self.settings.ends()
        x = QuantConv(self.width, self.settings.stem(), signed=True, name="conv1")(x, precision)
        x = nn.relu(_batch_norm("bn1", train)(x))
        for stage in range(3):
            for block in range((self.depth - 2) // 6):
                x = BasicBlock(
                    self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    shortcut=self.shortcut,
                    settings=self.settings,
                    name=f"layer{stage + 1}_{block}",
                )(x, train, precision)
        x = jnp.mean(x, axis=(1, 2))
        return QuantDense(self.num_classes, ends, name="fc")(x, precision)


class ResNet18(nn.Module):
    """ResNet-18 for ImageNet; its shortcut convolutions are searched too."""

    bn_momentum: ClassVar[float] = BN_MOMENTUM
    num_classes: int
    settings: QuantSettings

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, precision: Precision = FULL) -> jax.Array:
        """Returns class scores [n, num_classes] of normalised images [n, h, w, 3]."""
        ends = self.settings.ends()
        stem = QuantConv(
            64, self.settings.stem(), signed=True, kernel_size=7, stride=2, name="conv1"
        )
        x = nn.relu(_batch_norm("bn1", train)(stem(x, precision)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in range(4):
            for block in range(2):
                x = BasicBlock(
                    64 * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    shortcut="conv",
                    settings=self.settings,
                    name=f"layer{stage + 1}_{block}",
                )(x, train, precision)
        x = jnp.mean(x, axis=(1, 2))
        return QuantDense(self.num_classes, ends, name="fc")(x, precision)
