"""MobileNet-v2 (Sandler et al., 2018) in plain Flax, and the blocks that version 3 shares.

Quantizers come out as in MetaMix's code: linear bottleneck outputs are signed, ReLU outputs
unsigned, hswish outputs unsigned after a shift of 3/8; squeeze-and-excite layers are searched too.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from metamix_jax.errors import UserError
from metamix_jax.networks.architecture import (
    Architecture,
    Fields,
    Rules,
    TorchNames,
    check_padding,
)
from metamix_jax.networks.torch_layers import batch_norm, conv

DROPOUT = 0.2

# expansion factor, channels, blocks, stride of the first block
V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
V2_TOTAL_STRIDES = (1, 2, 4, 8, 16, 32)


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project; [n, h, w, c] -> [n, h / s, w / s, features].

    norm: batch norm, given `train` and its name.
    """

    expanded: int
    features: int
    kernel_size: int = 3
    stride: int = 1
    squeeze: bool = False
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    norm: Callable[[bool, str], nn.BatchNorm] = batch_norm
    padding: str = "torch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Runs the block."""
        y = x
        if self.expanded != x.shape[-1]:
            y = conv(self.expanded, 1, name="expand")(y)
            y = self.activation(self.norm(train, "expand_bn")(y))
        y = conv(
            self.expanded,
            self.kernel_size,
            self.stride,
            groups=self.expanded,
            padding=self.padding,
            name="depthwise",
        )(y)
        y = self.activation(self.norm(train, "depthwise_bn")(y))
        if self.squeeze:
            gate = jnp.mean(y, axis=(1, 2), keepdims=True)
            squeezed = _divisible_by_8(self.expanded / 4)
            gate = nn.relu(conv(squeezed, 1, use_bias=True, name="se_fc1")(gate))
            gate = conv(self.expanded, 1, use_bias=True, name="se_fc2")(gate)
            y = y * nn.hard_sigmoid(gate)
        y = self.norm(train, "project_bn")(conv(self.features, 1, name="project")(y))
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """MobileNet-v2.

    width: factor of all channels but the last convolution's, which has at least 1280.
    total_stride: height of images over that of the last features; below 32, the first strides of 2
      become 1. Images of 32 pixels need 8 or 16.
    padding: "torch", or "tf" for TensorFlow's SAME.
    """

    num_classes: int
    width: float = 1.0
    total_stride: int = 32
    padding: str = "torch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, 3]."""
        stem_stride, *strides = _strides(self.total_stride)
        stem_channels = _divisible_by_8(32 * self.width)
        x = conv(stem_channels, 3, stem_stride, padding=self.padding, name="stem")(x)
        x = nn.relu6(batch_norm(train, "stem_bn")(x))
        block = 0
        for (factor, channels, repeats, _), stride in zip(V2_STAGES, strides, strict=True):
            for repeat in range(repeats):
                block += 1
                x = InvertedResidual(
                    factor * x.shape[-1],
                    _divisible_by_8(channels * self.width),
                    stride=stride if repeat == 0 else 1,
                    activation=nn.relu6,
                    padding=self.padding,
                    name=f"block{block}",
                )(x, train)
        x = conv(_divisible_by_8(1280 * max(1.0, self.width)), 1, name="last_conv")(x)
        x = nn.relu6(batch_norm(train, "last_bn")(x))
        x = nn.Dropout(DROPOUT, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        return nn.Dense(self.num_classes, name="classifier")(x)


def _strides(total_stride: int) -> list[int]:
    """Returns the strides of the stem and the stages."""
    strides = [2, *(stride for _, _, _, stride in V2_STAGES)]
    for position in range(len(strides)):
        if math.prod(strides) > total_stride:
            strides[position] = 1
    return strides


def check_v2(fields: Fields, source: str) -> None:
    """Raises UserError for an invalid padding, width or total stride."""
    check_padding(fields, source)
    if not 0 < fields.get("width", 1.0) <= 64:
        raise UserError(f"{source}.width={fields['width']}: expected more than 0, at most 64")
    if fields.get("total_stride", 32) not in V2_TOTAL_STRIDES:
        raise UserError(
            f"{source}.total_stride={fields['total_stride']}: expected one of "
            f"{', '.join(map(str, V2_TOTAL_STRIDES))}"
        )


def _divisible_by_8(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    # At most 10 % below, as in the papers' code.
    return rounded + 8 if rounded < 0.9 * channels else rounded


def conv_and_norm(ours: str, theirs: str) -> Rules:
    """Returns the rules of a convolution and its batch norm, numbers 0 and 1 in PyTorch."""
    return (rf"^{ours}$", f"{theirs}.0"), (rf"^{ours}_bn$", f"{theirs}.1")


V2_TORCH_NAMES = TorchNames(
    modules=(
        # The first block has no expansion, so its layers have lower indices.
        *conv_and_norm(r"block1\.depthwise", "features.1.conv.0"),
        (r"^block1\.project$", "features.1.conv.1"),
        (r"^block1\.project_bn$", "features.1.conv.2"),
        *conv_and_norm(r"block(\d+)\.expand", r"features.\1.conv.0"),
        *conv_and_norm(r"block(\d+)\.depthwise", r"features.\1.conv.1"),
        (r"^block(\d+)\.project$", r"features.\1.conv.2"),
        (r"^block(\d+)\.project_bn$", r"features.\1.conv.3"),
        (r"^classifier$", "classifier.1"),
        (r"^last_conv$", "features.18.0"),
        (r"^last_bn$", "features.18.1"),
        *conv_and_norm("stem", "features.0"),
    )
)

ARCHITECTURES = (
    Architecture("mobilenet_v2", MobileNetV2, check=check_v2, torch_names=V2_TORCH_NAMES),
)
