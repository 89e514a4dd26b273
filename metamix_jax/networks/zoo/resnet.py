"""ResNets with post-activation blocks (He et al., 2016) in plain Flax: the CIFAR family, ResNet-18,
34, 50 and 101.

Module names follow PyTorch's, so that weight files can be mapped by name (TORCH_NAMES).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from metamix_jax.errors import UserError
from metamix_jax.networks.architecture import Architecture, Fields, TorchNames
from metamix_jax.networks.torch_layers import batch_norm, conv


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, [n, h, w, c] -> [n, h / stride, w / stride, features].

    shortcut, used if shapes differ: "conv" is a 1x1 convolution, which is searched like the others;
    "identity" subsamples and zero-pads channels (the paper's option A).
    """

    features: int
    stride: int
    shortcut: str = "conv"
    padding: str = "torch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Runs the block."""
        y = conv(self.features, 3, self.stride, padding=self.padding, name="conv1")(x)
        y = nn.relu(batch_norm(train, "bn1")(y))
        y = conv(self.features, padding=self.padding, name="conv2")(y)
        y = batch_norm(train, "bn2")(y)
        if x.shape != y.shape and self.shortcut == "conv":
            x = conv(self.features, 1, self.stride, name="downsample_conv")(x)
            x = batch_norm(train, "downsample_bn")(x)
        elif x.shape != y.shape:
            extra = self.features - x.shape[-1]
            x = x[:, :: self.stride, :: self.stride]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
        return nn.relu(x + y)


class CifarResNet(nn.Module):
    """A ResNet for small images: a 3x3 stem and 3 stages of (depth - 2) / 6 blocks."""

    num_classes: int
    depth: int = 20
    width: int = 16  # channels of the first stage, doubled by each later one
    shortcut: str = "identity"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, c]."""
        x = nn.relu(batch_norm(train, "bn1")(conv(self.width, name="conv1")(x)))
        for stage in range(3):
            for block in range((self.depth - 2) // 6):
                x = BasicBlock(
                    self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    shortcut=self.shortcut,
                    name=f"layer{stage + 1}_{block}",
                )(x, train)
        return nn.Dense(self.num_classes, name="fc")(jnp.mean(x, axis=(1, 2)))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, [n, h, w, c] -> [n, h / stride, w / stride, 4 * features]."""

    features: int
    stride: int
    padding: str = "torch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Runs the block."""
        widened = 4 * self.features
        y = nn.relu(batch_norm(train, "bn1")(conv(self.features, 1, name="conv1")(x)))
        y = conv(self.features, 3, self.stride, padding=self.padding, name="conv2")(y)
        y = nn.relu(batch_norm(train, "bn2")(y))
        y = batch_norm(train, "bn3")(conv(widened, 1, name="conv3")(y))
        if x.shape != y.shape:
            x = conv(widened, 1, self.stride, name="downsample_conv")(x)
            x = batch_norm(train, "downsample_bn")(x)
        return nn.relu(x + y)


class ImageNetResNet(nn.Module):
    """A ResNet for ImageNet: 7x7 stem, max pooling, four stages; shortcuts are searched too."""

    stage_sizes: ClassVar[tuple[int, ...]]
    block: ClassVar[type[nn.Module]] = BasicBlock
    num_classes: int
    padding: str = "torch"  # "tf": TensorFlow's SAME

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, 3]."""
        x = conv(64, 7, 2, padding=self.padding, name="conv1")(x)
        x = nn.relu(batch_norm(train, "bn1")(x))
        pool_padding = "SAME" if self.padding == "tf" else ((1, 1), (1, 1))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=pool_padding)
        for stage, size in enumerate(self.stage_sizes):
            for block in range(size):
                x = self.block(
                    64 * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    padding=self.padding,
                    name=f"layer{stage + 1}_{block}",
                )(x, train)
        return nn.Dense(self.num_classes, name="fc")(jnp.mean(x, axis=(1, 2)))


class ResNet18(ImageNetResNet):
    """ResNet-18."""

    stage_sizes = (2, 2, 2, 2)


class ResNet34(ImageNetResNet):
    """ResNet-34."""

    stage_sizes = (3, 4, 6, 3)


class ResNet50(ImageNetResNet):
    """ResNet-50."""

    stage_sizes = (3, 4, 6, 3)
    block = BottleneckBlock


class ResNet101(ImageNetResNet):
    """ResNet-101, our teacher for distillation; the paper does not name its own."""

    stage_sizes = (3, 4, 23, 3)
    block = BottleneckBlock


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
ARCHITECTURES = (
    Architecture(
        "cifar_resnet",
        CifarResNet,
        check=check_cifar_resnet,
        label=lambda fields: f"cifar_resnet{fields.get('depth', '')}",
        ompq_rounds_below=True,
        **_RESNET,
    ),
    Architecture("resnet18", ResNet18, ompq_rounds_below=True, **_RESNET),
    Architecture("resnet34", ResNet34, **_RESNET),
    Architecture("resnet50", ResNet50, **_RESNET),
    Architecture("resnet101", ResNet101, **_RESNET),
)
