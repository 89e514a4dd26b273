"""MobileNet-v3, large and small (Howard et al., 2019); its blocks are MobileNet-v2's."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from metamix_jax.networks.architecture import Architecture, TorchNames
from metamix_jax.networks.drawing import IMAGE, Drawing
from metamix_jax.networks.layers import HSWISH_SHIFT, QuantConv, QuantDense
from metamix_jax.networks.precision import FULL, Precision, QuantSettings
from metamix_jax.networks.zoo import mobilenet
from metamix_jax.networks.zoo.mobilenet import (
    InvertedResidual,
    batch_norm,
    conv_and_norm,
    draw_block,
)

_MOMENTUM, _EPSILON = 0.99, 1e-3


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

    bn_momentum: ClassVar[float] = _MOMENTUM
    rows: ClassVar[tuple[Bneck, ...]] = V3_LARGE
    hidden: ClassVar[int] = 1280  # features between the two classifiers
    num_classes: int
    settings: QuantSettings
    padding: str = "torch"  # "tf": TensorFlow's SAME

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, precision: Precision = FULL) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, 3]."""
        norm = batch_norm(_MOMENTUM, _EPSILON)
        stem = QuantConv(
            16, self.settings.stem(), signed=True, stride=2, padding=self.padding, name="stem"
        )
        x = nn.hard_swish(norm(train, name="stem_bn")(stem(x, precision)))
        for i, row in enumerate(self.rows):
            x = InvertedResidual(
                expanded=row.expanded,
                features=row.features,
                settings=self.settings,
                norm=norm,
                kernel_size=row.kernel_size,
                stride=row.stride,
                squeeze=row.squeeze,
                hswish=row.hswish,
                activation=nn.hard_swish if row.hswish else nn.relu,
                input_shift=HSWISH_SHIFT if i == 0 else 0.0,
                padding=self.padding,
                name=f"bneck{i + 1}",
            )(x, train, precision)
        features = self.rows[-1].expanded
        head = QuantConv(features, self.settings, signed=True, kernel_size=1, name="head_conv")
        x = nn.hard_swish(norm(train, name="head_bn")(head(x, precision)))
        x = jnp.mean(x, axis=(1, 2))
        first = QuantDense(self.hidden, self.settings, shift=HSWISH_SHIFT, name="classifier1")
        x = first(x, precision)
        x = nn.Dropout(mobilenet.DROPOUT, deterministic=not train)(nn.hard_swish(x))
        ends = self.settings.ends()
        classifier = QuantDense(self.num_classes, ends, shift=HSWISH_SHIFT, name="classifier2")
        return classifier(x, precision)


class MobileNetV3Small(MobileNetV3Large):
    """MobileNet-v3-small of width 1.0."""

    rows = V3_SMALL
    hidden = 1024


def draw_mobilenet_v3(model: MobileNetV3Large, drawing: Drawing) -> None:
    """Adds the nodes of a MobileNet-v3."""
    x = drawing.layer(IMAGE, "stem", "stem_bn", "hswish")
    for i, row in enumerate(model.rows):
        x = draw_block(drawing, x, f"bneck{i + 1}", "hswish" if row.hswish else "relu")
    x = drawing.layer(x, "head_conv", "head_bn", "hswish")
    x = drawing.node("flatten", drawing.node("mean", x))
    drawing.layer(drawing.layer(x, "classifier1", activation="hswish"), "classifier2")


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
    Architecture(name, module, torch_names=_torch_names(module.rows), draw=draw_mobilenet_v3)
    for name, module in (
        ("mobilenet_v3_large", MobileNetV3Large),
        ("mobilenet_v3_small", MobileNetV3Small),
    )
)
