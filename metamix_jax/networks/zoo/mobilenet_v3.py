"""MobileNet-v3, large and small (Howard et al., 2019); its blocks are MobileNet-v2's."""

import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from metamix_jax.networks import torch_layers
from metamix_jax.networks.architecture import Architecture, TorchNames
from metamix_jax.networks.torch_layers import conv
from metamix_jax.networks.zoo.mobilenet import DROPOUT, InvertedResidual, conv_and_norm

batch_norm = functools.partial(torch_layers.batch_norm, momentum=0.99, epsilon=1e-3)


class Bneck(NamedTuple):
    """One row of MobileNet-v3's table."""

    kernel_size: int
    expanded: int  # channels of the depthwise convolution
    features: int
    squeeze: bool  # squeeze-and-excite
    hswish: bool  # otherwise ReLU
    stride: int


V3_LARGE = (
    Bneck(3, 16, 16, False, False, 1),
    Bneck(3, 64, 24, False, False, 2),
    Bneck(3, 72, 24, False, False, 1),
    Bneck(5, 72, 40, True, False, 2),
    Bneck(5, 120, 40, True, False, 1),
    Bneck(5, 120, 40, True, False, 1),
    Bneck(3, 240, 80, False, True, 2),
    Bneck(3, 200, 80, False, True, 1),
    Bneck(3, 184, 80, False, True, 1),
    Bneck(3, 184, 80, False, True, 1),
    Bneck(3, 480, 112, True, True, 1),
    Bneck(3, 672, 112, True, True, 1),
    Bneck(5, 672, 160, True, True, 2),
    Bneck(5, 960, 160, True, True, 1),
    Bneck(5, 960, 160, True, True, 1),
)


V3_SMALL = (
    Bneck(3, 16, 16, True, False, 2),
    Bneck(3, 72, 24, False, False, 2),
    Bneck(3, 88, 24, False, False, 1),
    Bneck(5, 96, 40, True, True, 2),
    Bneck(5, 240, 40, True, True, 1),
    Bneck(5, 240, 40, True, True, 1),
    Bneck(5, 120, 48, True, True, 1),
    Bneck(5, 144, 48, True, True, 1),
    Bneck(5, 288, 96, True, True, 2),
    Bneck(5, 576, 96, True, True, 1),
    Bneck(5, 576, 96, True, True, 1),
)


class MobileNetV3Large(nn.Module):
    """MobileNet-v3-large of width 1.0."""

    rows: ClassVar[tuple[Bneck, ...]] = V3_LARGE
    hidden: ClassVar[int] = 1280  # features between the two classifiers
    num_classes: int
    padding: str = "torch"  # "tf": TensorFlow's SAME

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, 3]."""
        x = conv(16, 3, 2, padding=self.padding, name="stem")(x)
        x = nn.hard_swish(batch_norm(train, "stem_bn")(x))
        for i, row in enumerate(self.rows):
            x = InvertedResidual(
                row.expanded,
                row.features,
                kernel_size=row.kernel_size,
                stride=row.stride,
                squeeze=row.squeeze,
                activation=nn.hard_swish if row.hswish else nn.relu,
                norm=batch_norm,
                padding=self.padding,
                name=f"bneck{i + 1}",
            )(x, train)
        x = conv(self.rows[-1].expanded, 1, name="head_conv")(x)
        x = nn.hard_swish(batch_norm(train, "head_bn")(x))
        x = nn.hard_swish(nn.Dense(self.hidden, name="classifier1")(jnp.mean(x, axis=(1, 2))))
        x = nn.Dropout(DROPOUT, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="classifier2")(x)


class MobileNetV3Small(MobileNetV3Large):
    """MobileNet-v3-small of width 1.0."""

    rows = V3_SMALL
    hidden = 1024


def _torch_names(rows: tuple[Bneck, ...]) -> TorchNames:
    """Returns torchvision's names; the projection comes after squeeze-and-excite, if any."""
    squeezing = "|".join(str(i + 1) for i, row in enumerate(rows) if row.squeeze)
    first = 1 + rows[0].squeeze  # the first block does not expand
    return TorchNames(
        modules=(
            *conv_and_norm(r"bneck1\.depthwise", "features.1.block.0"),
            (r"^bneck1\.se_(fc\d)$", r"features.1.block.1.\1"),
            *conv_and_norm(r"bneck1\.project", f"features.1.block.{first}"),
            *conv_and_norm(r"bneck(\d+)\.expand", r"features.\1.block.0"),
            *conv_and_norm(r"bneck(\d+)\.depthwise", r"features.\1.block.1"),
            (r"^bneck(\d+)\.se_(fc\d)$", r"features.\1.block.2.\2"),
            *conv_and_norm(rf"bneck({squeezing})\.project", r"features.\1.block.3"),
            *conv_and_norm(r"bneck(\d+)\.project", r"features.\1.block.2"),
            (r"^classifier1$", "classifier.0"),
            (r"^classifier2$", "classifier.3"),
            (r"^head_conv$", f"features.{len(rows) + 1}.0"),
            (r"^head_bn$", f"features.{len(rows) + 1}.1"),
            *conv_and_norm("stem", "features.0"),
        )
    )


ARCHITECTURES = tuple(
    Architecture(name, module, torch_names=_torch_names(module.rows))
    for name, module in (
        ("mobilenet_v3_large", MobileNetV3Large),
        ("mobilenet_v3_small", MobileNetV3Small),
    )
)
