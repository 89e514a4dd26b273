"""ResNets with post-activation blocks (He et al., 2016): the CIFAR family, ResNet-18, 50 and 101.

Module names follow PyTorch's, so that weight files can be mapped by name (TORCH_NAMES).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from metamix_jax.errors import UserError
from metamix_jax.networks.architecture import Architecture, Fields, TorchNames
from metamix_jax.networks.drawing import IMAGE, Drawing
from metamix_jax.networks.layers import QuantConv, QuantDense
from metamix_jax.networks.precision import FULL, Precision, QuantSettings

BN_MOMENTUM = 0.9


def _batch_norm(name: str, train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, momentum=BN_MOMENTUM, epsilon=1e-5, name=name
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, [n, h, w, c] -> [n, h / stride, w / stride, features].

    shortcut, used if shapes differ: "conv" is a quantized, searched 1x1 convolution; "identity"
    subsamples and zero-pads channels (the paper's option A).
    """

    features: int
    stride: int
    shortcut: str
    settings: QuantSettings
    padding: str = "torch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, precision: Precision) -> jax.Array:
        """Runs the block."""

        def conv(name: str, stride: int = 1, kernel_size: int = 3) -> QuantConv:
            return QuantConv(
                self.features,
                self.settings,
                kernel_size=kernel_size,
                stride=stride,
                padding=self.padding,
                name=name,
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
    """A ResNet for small images: a 3x3 stem and 3 stages of (depth - 2) / 6 blocks."""

    bn_momentum: ClassVar[float] = BN_MOMENTUM
    num_classes: int
    settings: QuantSettings
    depth: int = 20
    width: int = 16  # channels of the first stage, doubled by each later one
    shortcut: str = "identity"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, precision: Precision = FULL) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, c]."""
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


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, [n, h, w, c] -> [n, h / stride, w / stride, 4 * features]."""

    features: int
    stride: int
    settings: QuantSettings
    padding: str = "torch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, precision: Precision) -> jax.Array:
        """Runs the block."""

        def conv(name: str, features: int, kernel_size: int, stride: int = 1) -> QuantConv:
            return QuantConv(
                features,
                self.settings,
                kernel_size=kernel_size,
                stride=stride,
                padding=self.padding,
                name=name,
            )

        widened = 4 * self.features
        y = conv("conv1", self.features, 1)(x, precision)
        y = nn.relu(_batch_norm("bn1", train)(y))
        y = conv("conv2", self.features, 3, self.stride)(y, precision)
        y = nn.relu(_batch_norm("bn2", train)(y))
        y = conv("conv3", widened, 1)(y, precision)
        y = _batch_norm("bn3", train)(y)
        if x.shape != y.shape:
            x = conv("downsample_conv", widened, 1, self.stride)(x, precision)
            x = _batch_norm("downsample_bn", train)(x)
        return nn.relu(x + y)


class ImageNetResNet(nn.Module):
    """A ResNet for ImageNet: 7x7 stem, max pooling, four stages; shortcuts are searched too."""

    bn_momentum: ClassVar[float] = BN_MOMENTUM
    stage_sizes: ClassVar[tuple[int, ...]]
    bottleneck: ClassVar[bool]
    num_classes: int
    settings: QuantSettings
    padding: str = "torch"  # "tf": TensorFlow's SAME

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, precision: Precision = FULL) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, 3]."""
        stem = QuantConv(
            64,
            self.settings.stem(),
            signed=True,
            kernel_size=7,
            stride=2,
            padding=self.padding,
            name="conv1",
        )
        x = nn.relu(_batch_norm("bn1", train)(stem(x, precision)))
        pool_padding = "SAME" if self.padding == "tf" else ((1, 1), (1, 1))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=pool_padding)
        for stage, size in enumerate(self.stage_sizes):
            for block in range(size):
                options = {
                    "features": 64 * 2**stage,
                    "stride": 2 if stage > 0 and block == 0 else 1,
                    "settings": self.settings,
                    "padding": self.padding,
                    "name": f"layer{stage + 1}_{block}",
                }
                if self.bottleneck:
                    x = BottleneckBlock(**options)(x, train, precision)
                else:
                    x = BasicBlock(shortcut="conv", **options)(x, train, precision)
        x = jnp.mean(x, axis=(1, 2))
        return QuantDense(self.num_classes, self.settings.ends(), name="fc")(x, precision)


class ResNet18(ImageNetResNet):
    """ResNet-18."""

    stage_sizes = (2, 2, 2, 2)
    bottleneck = False


class ResNet34(ImageNetResNet):
    """ResNet-34."""

    stage_sizes = (3, 4, 6, 3)
    bottleneck = False


class ResNet50(ImageNetResNet):
    """ResNet-50."""

    stage_sizes = (3, 4, 6, 3)
    bottleneck = True


class ResNet101(ImageNetResNet):
    """ResNet-101, our teacher for distillation; the paper does not name its own."""

    stage_sizes = (3, 4, 23, 3)
    bottleneck = True


def draw_cifar_resnet(model: CifarResNet, drawing: Drawing) -> None:
    """Adds the nodes of a CIFAR ResNet."""
    x = drawing.layer(IMAGE, "conv1", "bn1", "relu")
    for stage in range(3):
        for block in range((model.depth - 2) // 6):
            x = _draw_block(drawing, x, f"layer{stage + 1}_{block}", convolutions=2)
    drawing.layer(drawing.node("flatten", drawing.node("mean", x)), "fc")


def draw_imagenet_resnet(model: ImageNetResNet, drawing: Drawing) -> None:
    """Adds the nodes of an ImageNet ResNet."""
    x = drawing.layer(IMAGE, "conv1", "bn1", "relu")
    x = drawing.node("max_pool", x, size=3, stride=2, padding=model.padding)
    for stage, blocks in enumerate(model.stage_sizes):
        for block in range(blocks):
            name = f"layer{stage + 1}_{block}"
            x = _draw_block(drawing, x, name, convolutions=3 if model.bottleneck else 2)
    drawing.layer(drawing.node("flatten", drawing.node("mean", x)), "fc")


def _draw_block(drawing: Drawing, x: str, name: str, convolutions: int) -> str:
    y = x
    for i in range(1, convolutions + 1):
        activation = "relu" if i < convolutions else ""
        y = drawing.layer(y, f"{name}/conv{i}", f"{name}/bn{i}", activation)
    if drawing.has(f"{name}/downsample_conv"):
        x = drawing.layer(x, f"{name}/downsample_conv", f"{name}/downsample_bn")
    elif drawing.shape(x) != drawing.shape(y):
        missing = drawing.shape(y)[-1] - drawing.shape(x)[-1]
        stride = -(-drawing.shape(x)[0] // drawing.shape(y)[0])
        x = drawing.node(
            "subsample", x, stride=stride, channels=(missing // 2, missing - missing // 2)
        )
    return drawing.node("relu", drawing.node("add", x, y))


def check_cifar_resnet(fields: Fields, source: str) -> None:
    """Raises UserError for an unsupported depth, width or shortcut."""
    depth = fields.get("depth", 20)
    if not 8 <= depth <= 1202 or (depth - 2) % 6:
        raise UserError(f"{source}.depth={depth}: expected 6 n + 2, such as 8, 20, 32, 56")
    if not 1 <= fields.get("width", 16) <= 4096:
        raise UserError(f"{source}.width={fields['width']}: expected 1 to 4096")
    if fields.get("shortcut", "identity") not in ("identity", "conv"):
        raise UserError(f"{source}.shortcut={fields['shortcut']!r}: expected identity or conv")


TORCH_NAMES = TorchNames(
    modules=(
        (r"\blayer(\d+)_(\d+)\b", r"layer\1.\2"),
        (r"\bdownsample_conv\b", "downsample.0"),
        (r"\bdownsample_bn\b", "downsample.1"),
    ),
    aliases=((r"^linear\.", "fc."),),  # the classifier of CIFAR networks
)
_RESNET = {"torch_names": TORCH_NAMES, "shortcut": "downsample_conv"}
_IMAGENET = {"draw": draw_imagenet_resnet, **_RESNET}
ARCHITECTURES = (
    Architecture(
        "cifar_resnet",
        CifarResNet,
        check=check_cifar_resnet,
        label=lambda fields: f"cifar_resnet{fields.get('depth', '')}",
        draw=draw_cifar_resnet,
        ompq_rounds_below=True,
        **_RESNET,
    ),
    Architecture("resnet18", ResNet18, ompq_rounds_below=True, **_IMAGENET),
    Architecture("resnet34", ResNet34, **_IMAGENET),
    Architecture("resnet50", ResNet50, **_IMAGENET),
    Architecture("resnet101", ResNet101, **_IMAGENET),
)
