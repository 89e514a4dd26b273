"""Vision transformers (Dosovitskiy et al., 2021; Touvron et al., 2021) in plain Flax.

Names are timm's. The quantizers come in as in any network (intercepted.py); attention's products
are layers of their own.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from metamix_jax.errors import UserError
from metamix_jax.networks.architecture import Architecture, Fields, TorchNames

EPSILON = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Attends, [n, tokens, width] -> the same."""
        n, tokens, width = x.shape
        size = width // self.heads
        x = nn.Dense(3 * width, name="qkv")(x).reshape(n, tokens, 3, self.heads, size)
        queries, keys, values = jnp.moveaxis(x, 2, 0)
        scores = jnp.einsum("nqhd,nkhd->nhqk", queries * size**-0.5, keys)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", nn.softmax(scores), values)
        return nn.Dense(width, name="proj")(mixed.reshape(n, tokens, width))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and beside a skip connection."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Runs the block, [n, tokens, width] -> the same."""
        width = x.shape[-1]
        x += Attention(self.heads, name="attn")(nn.LayerNorm(EPSILON, name="norm1")(x))
        y = nn.LayerNorm(EPSILON, name="norm2")(x)
        y = nn.gelu(nn.Dense(4 * width, name="mlp_fc1")(y), approximate=False)
        return x + nn.Dense(width, name="mlp_fc2")(y)


class VisionTransformer(nn.Module):
    """A vision transformer with a class token; its defaults are ViT-tiny/16."""

    num_classes: int
    patch_size: int = 16
    width: int = 192
    depth: int = 12
    heads: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, c]."""
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.width, patch, strides=patch, padding="VALID", name="patch_embed_proj")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        normal = nn.initializers.normal(0.02)
        token = self.param("cls_token", normal, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        x += self.param("pos_embed", normal, (1, x.shape[1], self.width))
        for block in range(self.depth):
            x = Block(self.heads, name=f"blocks_{block}")(x)
        x = nn.LayerNorm(EPSILON, name="norm")(x)
        return nn.Dense(self.num_classes, name="head")(x[:, 0])


class DeiTTiny(VisionTransformer):
    """DeiT-tiny: ViT-tiny, trained in another way."""


def check_transformer(fields: Fields, source: str) -> None:
    """Raises UserError unless the heads share the width evenly."""
    width, heads = fields.get("width", 192), fields.get("heads", 3)
    if heads < 1 or width % heads:
        raise UserError(f"{source}.heads={heads}: expected a divisor of {source}.width={width}")


_NAMES = TorchNames(
    modules=(
        (r"^patch_embed_proj$", "patch_embed.proj"),
        (r"^blocks_(\d+)\.mlp_(fc\d)$", r"blocks.\1.mlp.\2"),
        (r"^blocks_(\d+)\.", r"blocks.\1."),
    )
)
ARCHITECTURES = (
    Architecture("vit_tiny", VisionTransformer, check=check_transformer, torch_names=_NAMES),
    Architecture("deit_tiny", DeiTTiny, check=check_transformer, torch_names=_NAMES),
)
