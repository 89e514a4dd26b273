"""ConvNeXt (Liu et al., 2022) in its smallest sizes, in plain Flax; names are timm's."""

import jax
from flax import linen as nn

from metamix_jax.networks.architecture import Architecture, TorchNames

EPSILON = 1e-6


class Block(nn.Module):
    """A 7x7 depthwise convolution and a two-layer perceptron beside a skip connection."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Runs the block, [n, h, w, c] -> the same."""
        channels = x.shape[-1]
        padding = ((3, 3), (3, 3))
        y = nn.Conv(
            channels, (7, 7), padding=padding, feature_group_count=channels, name="conv_dw"
        )(x)
        y = nn.LayerNorm(EPSILON, name="norm")(y)
        y = nn.gelu(nn.Conv(4 * channels, (1, 1), name="mlp_fc1")(y), approximate=False)
        y = nn.Conv(channels, (1, 1), name="mlp_fc2")(y)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (channels,))
        return x + y * gamma.reshape(1, 1, 1, -1)


class ConvNeXtAtto(nn.Module):
    """ConvNeXt-atto."""

    num_classes: int
    depths: tuple[int, ...] = (2, 2, 6, 2)
    widths: tuple[int, ...] = (40, 80, 160, 320)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, 3]."""
        x = nn.Conv(self.widths[0], (4, 4), strides=(4, 4), padding="VALID", name="stem_0")(x)
        x = nn.LayerNorm(EPSILON, name="stem_1")(x)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            name = f"stages_{stage}"
            if stage:
                x = nn.LayerNorm(EPSILON, name=f"{name}_downsample_0")(x)
                x = nn.Conv(
                    width, (2, 2), strides=(2, 2), padding="VALID", name=f"{name}_downsample_1"
                )(x)
            for block in range(depth):
                x = Block(name=f"{name}_blocks_{block}")(x)
        x = nn.LayerNorm(EPSILON, name="head_norm")(x.mean((1, 2)))
        return nn.Dense(self.num_classes, name="head_fc")(x)


_NAMES = TorchNames(
    modules=(
        (r"^stem_(\d)$", r"stem.\1"),
        (r"^stages_(\d)_downsample_(\d)$", r"stages.\1.downsample.\2"),
        (r"^stages_(\d)_blocks_(\d+)", r"stages.\1.blocks.\2"),
        (r"\.mlp_(fc\d)$", r".mlp.\1"),
        (r"^head_(\w+)$", r"head.\1"),
    )
)
ARCHITECTURES = (Architecture("convnext_atto", ConvNeXtAtto, torch_names=_NAMES),)
