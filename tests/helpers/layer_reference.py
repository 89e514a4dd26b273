"""One quantized layer as a network, and a NumPy reference of what it computes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from metamix_jax.networks.precision import FULL, Precision
from tests.helpers.quant_layers import QuantConv

KEYS = {"params": jax.random.key(0), "quant": jax.random.key(1)}
NAME = "layer"
CONV_INPUT = np.random.default_rng(0).normal(size=(2, 7, 7, 4)).astype(np.float32)
DENSE_INPUT = np.abs(CONV_INPUT[:, 0, 0])


class Net(nn.Module):
    """One named layer, so that it has a path."""

    kind: type = QuantConv
    options: tuple = ()

    @nn.compact
    def __call__(self, x, precision=FULL):
        return self.kind(name=NAME, **dict(self.options))(x, precision)


def make_net(settings, kind=QuantConv, **options):
    options = {"features": 6, "settings": settings, **options}
    return Net(kind, tuple(options.items()))


def init(net, x, seed=2):
    """Returns variables with steps matching the data's scale and well-separated logits."""
    shapes = jax.eval_shape(net.init, KEYS, x)
    rng = np.random.default_rng(seed)
    ranges = {"act_step": (0.1, 0.6), "weight_step": (0.1, 0.6)}

    def draw(path, leaf):
        low, high = ranges.get(path[-1].key, (-1, 1))
        return jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float32)

    collections = {name: shapes[name] for name in ("params", "quant")}
    return jax.tree.map_with_path(draw, collections)


def apply(net, variables, x, activations="full", weights="full", branch=None):
    branches = None if branch is None else {NAME: branch}
    return net.apply(variables, x, Precision(activations, weights, branches))


def reference_quant(x, step, bits, signed, shift=0.0):
    low, high = (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.clip(np.rint((x + np.float32(shift)) / step), low, high) * step - np.float32(shift)


def reference_conv(x, kernel, stride=1, groups=1, padding="torch"):
    """A convolution as a sum over kernel positions, group by group."""
    n, height, width, channels = x.shape
    k, features = kernel.shape[0], kernel.shape[-1]
    if padding == "torch":
        margins = [((k - 1) // 2,) * 2] * 2
    else:
        totals = [max((-(-size // stride) - 1) * stride + k - size, 0) for size in (height, width)]
        margins = [(total // 2, total - total // 2) for total in totals]
    x = np.pad(x, [(0, 0), *margins, (0, 0)])
    out_h, out_w = ((size - k) // stride + 1 for size in x.shape[1:3])
    y = np.zeros((n, out_h, out_w, features), np.result_type(x, kernel))
    inputs, outputs = channels // groups, features // groups
    for group in range(groups):
        ins = slice(group * inputs, (group + 1) * inputs)
        outs = slice(group * outputs, (group + 1) * outputs)
        for i in range(k):
            for j in range(k):
                rows = slice(i, i + (out_h - 1) * stride + 1, stride)
                columns = slice(j, j + (out_w - 1) * stride + 1, stride)
                y[..., outs] += x[:, rows, columns, ins] @ kernel[i, j, :, outs]
    return y


def count(jaxpr, primitive):
    """Returns how often a primitive occurs in a jaxpr and its calls, except CPU branches."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == primitive
        for value in equation.params.values():
            inner = _inner_jaxprs(value)
            if equation.primitive.name == "cond":  # of platform_dependent
                inner = inner[-1:]
            total += sum(count(part, primitive) for part in inner)
    return total


def _inner_jaxprs(value):
    parts = value if isinstance(value, tuple | list) else [value]
    parts = [getattr(part, "jaxpr", part) for part in parts]
    return [part for part in parts if hasattr(part, "eqns")]
