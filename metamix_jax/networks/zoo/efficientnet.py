"""EfficientNet-B0 (Tan and Le, 2019) in plain Flax; names are torchvision's."""

from typing import NamedTuple

import jax
from flax import linen as nn

from metamix_jax.networks.architecture import Architecture, TorchNames
from metamix_jax.networks.torch_layers import batch_norm, conv

DROPOUT = 0.2


class Stage(NamedTuple):
    """Blocks of one kind."""

    expansion: int
    kernel_size: int
    stride: int  # of the first block
    features: int
    repeats: int


STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)


class ConvNorm(nn.Module):
    """A convolution padded as in PyTorch, and batch norm."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Convolves and normalizes, [n, h, w, c] -> [n, h / stride, w / stride, features]."""
        groups = x.shape[-1] if self.depthwise else 1
        x = conv(self.features, self.kernel_size, self.stride, groups, name="conv")(x)
        return batch_norm(train, "norm")(x)


class MBConv(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project."""

    stage: Stage
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Runs the block, [n, h, w, c] -> [n, h / stride, w / stride, features]."""
        channels, y = x.shape[-1], x
        expanded = channels * self.stage.expansion
        if expanded != channels:
            y = nn.silu(ConvNorm(expanded, name="expand")(y, train))
        size = self.stage.kernel_size
        y = nn.silu(ConvNorm(expanded, size, self.stride, True, name="depthwise")(y, train))
        gate = y.mean((1, 2), keepdims=True)
        gate = nn.silu(nn.Conv(max(1, channels // 4), (1, 1), name="se_fc1")(gate))
        y *= nn.sigmoid(nn.Conv(expanded, (1, 1), name="se_fc2")(gate))
        y = ConvNorm(self.stage.features, name="project")(y, train)
        return x + y if x.shape == y.shape else y


class EfficientNetB0(nn.Module):
    """EfficientNet-B0, without stochastic depth."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, 3]."""
        x = nn.silu(ConvNorm(32, 3, 2, name="stem")(x, train))
        for number, stage in enumerate(STAGES, start=1):
            for block in range(stage.repeats):
                stride = stage.stride if block == 0 else 1
                x = MBConv(stage, stride, name=f"stage{number}_{block}")(x, train)
        x = nn.silu(ConvNorm(1280, name="last")(x, train))
        x = nn.Dropout(DROPOUT, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.num_classes, name="classifier")(x)


# Of a block's parts; the first stage does not expand.
_PARTS = {"expand": 0, "depthwise": 1, "se": 2, "project": 3}
_NAMES = TorchNames(
    modules=(
        (r"^stem\.", "features.0."),
        (r"^last\.", "features.8."),
        (r"^classifier$", "classifier.1"),
        *(
            (rf"^stage1_0\.{part}[._]", f"features.1.0.block.{number - 1}.")
            for part, number in _PARTS.items()
            if number
        ),
        *(
            (rf"^stage(\d)_(\d)\.{part}[._]", rf"features.\1.\2.block.{number}.")
            for part, number in _PARTS.items()
        ),
        (r"\.conv$", ".0"),
        (r"\.norm$", ".1"),
    )
)
ARCHITECTURES = (Architecture("efficientnet_b0", EfficientNetB0, torch_names=_NAMES),)
