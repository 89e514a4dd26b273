"""Networks as users write them: plain Flax, with nothing of this package."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        y = nn.Conv(channels, (3, 3), feature_group_count=channels, use_bias=False)(x)
        y = nn.silu(nn.GroupNorm(2)(y))
        return x + nn.Conv(channels, (1, 1))(y)


class Net(nn.Module):
    """GroupNorm, SiLU, a depthwise convolution, a skip connection and a shared block."""

    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.silu(nn.GroupNorm(2)(nn.Conv(self.width, (3, 3))(x)))
        block = Block()
        x = block(block(x))
        x = nn.silu(nn.GroupNorm(2)(nn.Conv(2 * self.width, (3, 3), strides=2)(x)))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class NnxBlock(nnx.Module):
    def __init__(self, channels, *, rngs):
        self.depthwise = nnx.Conv(
            channels, channels, (3, 3), feature_group_count=channels, use_bias=False, rngs=rngs
        )
        self.norm = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        self.pointwise = nnx.Conv(channels, channels, (1, 1), rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.pointwise(nnx.silu(self.norm(self.depthwise(x)))))


class NnxNet(nnx.Module):
    """Batch norm, dropout, a list of blocks, and attention."""

    def __init__(self, num_classes, width=8, *, rngs):
        self.stem = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.blocks = nnx.List([NnxBlock(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=width, decode=False, rngs=rngs
        )
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return self.head((tokens + self.attention(tokens)).mean(1))


def conv(features, name, stride=1):
    return nn.Conv(
        features, (3, 3), strides=stride, padding=1, use_bias=False,
        kernel_init=nn.initializers.he_normal(), name=name,
    )  # fmt: skip


class Scanned(nn.Module):
    """Layers inside nn.scan, which share one equation."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        class Cell(nn.Module):
            @nn.compact
            def __call__(self, carry, _):
                return nn.Dense(8)(carry), None

        scan = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scan()(nn.Dense(8)(x.mean((1, 2))), None)
        return nn.Dense(self.num_classes)(x)


class Half(nn.Module):
    """Computes in bfloat16."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes, dtype=jnp.bfloat16)(x.mean((1, 2)))


class WrongShape(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x)


class NeedsWidth(nn.Module):
    num_classes: int
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(nn.Dense(self.width)(x.mean((1, 2))))


class NoLayers(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return jnp.tile(x.mean((1, 2))[:, :1], (1, self.num_classes))


def two_momenta(num_classes):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            for momentum in (0.9, 0.99):
                x = nn.BatchNorm(use_running_average=not train, momentum=momentum)(x)
            return nn.Dense(num_classes)(x.mean((1, 2)))

    return Two()


def attention(queries, keys):
    """Returns scores of dot-product attention, as nn.MultiHeadDotProductAttention computes them."""
    return jnp.einsum("...qd,...kd->...qk", queries / jnp.sqrt(queries.shape[-1]), keys)


class Attending(nn.Module):
    """One product of two inputs."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        queries, keys = nn.Dense(4, name="queries")(tokens), nn.Dense(4, name="keys")(tokens)
        shares = jax.nn.softmax(attention(queries, keys))
        return nn.Dense(self.num_classes, name="head")((shares @ tokens).mean(1))


not_a_network = 3


class Everything(nn.Module):
    """Every operation that can be exported, at least once."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.hard_swish(nn.Conv(8, (3, 3))(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        y = nn.avg_pool(jnp.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0))), (2, 2))
        x = nn.gelu(nn.Conv(8, (1, 1))(x)) + nn.leaky_relu(y[:, 1:, 1:][:, :, ::1])[:, :1, :1]
        left, right = jnp.split(nn.Conv(12, (3, 3), padding="VALID")(x), [4], axis=-1)
        x = jnp.concatenate([left, nn.elu(right), jnp.where(left > 0.1, left, 0.5)], axis=-1)
        x = jnp.clip(x, -1.0, 2.0) ** 3 + nn.gelu(x, approximate=False) + jnp.sign(x) * abs(x)
        x += jnp.broadcast_to(x.mean(-1, keepdims=True), x.shape)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        first = self.param("first", nn.initializers.normal(), (1, 1, x.shape[-1]))
        tokens = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, x.shape[-1])), tokens], 1)
        tokens = nn.LayerNorm()(tokens)
        kernel = self.param("crossing", nn.initializers.normal(), (*tokens.shape[:0:-1], 6))
        crossed = jnp.einsum("nab,baf->nf", tokens, kernel)
        tokens += nn.MultiHeadDotProductAttention(num_heads=2)(tokens, tokens)
        tokens += nn.DenseGeneral(tokens.shape[1], axis=1)(tokens).swapaxes(1, 2)
        kernel = self.param("mixing", nn.initializers.normal(), (tokens.shape[-1], 6))
        mixed = jnp.einsum("cf,ntc->nft", kernel, tokens)
        mixed = jnp.log1p(jnp.exp(-jnp.square(mixed))) + jnp.floor(jnp.tanh(mixed) * 2)
        mixed = mixed / jnp.sqrt(1 + mixed**2) - jnp.minimum(mixed, mixed.min(-1, keepdims=True))
        gate = nn.sigmoid(nn.Dense(6)(tokens[:, 0]) + crossed)
        return nn.Dense(self.num_classes)(mixed.max(-1) * gate + 1 / (1 + gate))


class Deployed(nn.Module):
    """Operations that all have integer kernels, written as Flax users write them."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        def norm():
            return nn.BatchNorm(use_running_average=not train)

        x = nn.hard_swish(norm()(nn.Conv(8, (3, 3))(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        y = nn.relu6(norm()(nn.Conv(8, (3, 3), feature_group_count=8)(x)))
        x = nn.relu(x + norm()(nn.Conv(8, (1, 1))(y)))
        y = nn.silu(norm()(nn.Conv(12, (3, 3), strides=2, padding=1)(x)))
        gate = nn.relu(nn.Conv(4, (1, 1))(y.mean((1, 2), keepdims=True)))
        y *= nn.sigmoid(nn.Conv(12, (1, 1))(gate))
        y *= nn.hard_sigmoid(nn.Conv(12, (1, 1))(nn.relu(y)))
        x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2))) + y
        x = nn.relu(0.5 - nn.Dense(8)(x.mean((1, 2))))
        return nn.Dense(self.num_classes)(x)


class Counts(nn.Module):
    """Asks how many images there are, which a symbolic batch cannot tell."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x)).reshape(len(x), -1)
        return nn.Dense(self.num_classes)(x)


class Sorts(nn.Module):
    """Sorts, which cannot be exported."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = jnp.sort(nn.Conv(4, (3, 3), name="stem")(x), axis=-1)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class Dilated(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.Conv(4, (3, 3), kernel_dilation=2, name="wide")(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class Mixes(nn.Module):
    """Compares images with each other."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        return nn.Dense(self.num_classes)((x - x.mean(0, keepdims=True)).mean((1, 2)))
