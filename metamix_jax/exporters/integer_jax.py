"""An exported network in JAX on integers: int8 times int8 into int32, for GPUs and TPUs.

What lies between the layers is float32, as in the reference executor; sums are the same integers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from metamix_jax.exporters import bundle, executor
from metamix_jax.exporters.executor import places
from metamix_jax.exporters.graph import Graph, Node, Quantizer, normalise

HALF = 128  # int8 holds the levels of 8 bits without sign less this
Levels = Mapping[str, jax.Array]  # layer -> its kernel, int8


@dataclasses.dataclass(frozen=True)
class IntegerNetwork:
    """A bundle on JAX's default device.

    graph: its layers, policy and input format.
    """

    graph: Graph

    @functools.cached_property
    def _scores(self) -> jax.stages.Wrapped:
        kernels = {node.name: jnp.asarray(node.kernel.levels) for node in self.graph.layers}
        # Arguments, not constants of the program, which would be compiled with it.
        run = jax.jit(functools.partial(_run, self.graph))
        return functools.partial(run, kernels)

    def scores(self, pixels: np.ndarray | jax.Array) -> jax.Array:
        """Returns class scores [n, num_classes] of uint8 pixels [n, h, w, c]."""
        return self._scores(jnp.asarray(pixels))


def load_integer(directory: str | Path) -> IntegerNetwork:
    """Returns the network of an exported bundle, to run on integers in JAX.

    Raises:
      UserError: `directory` has no bundle, or a damaged one.
    """
    return IntegerNetwork(bundle.read_bundle(Path(directory).expanduser()))


def _run(graph: Graph, kernels: Levels, pixels: jax.Array) -> jax.Array:
    def layer(node: Node, x: jax.Array) -> jax.Array:
        if node.quantizer is None:
            return _float_layer(node, x, kernels[node.name])
        levels = executor.quantize(x, node.quantizer, jnp)
        sums = integer_product(node, levels, kernels[node.name])
        return executor.real_output(node, sums, x.shape[1:])

    with jax.numpy_rank_promotion("allow"):  # the nodes count on NumPy's rules
        return executor.evaluate(graph, normalise(pixels, graph), jnp, layer, matrix_product)


def integer_product(node: Node, levels: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns a layer's int32 accumulators.

    Args:
      node: the layer.
      levels: of its input, int32 [n, ...].
      kernel: its levels, int8.
    """
    less = _less(node.quantizer)
    x = (levels - less).astype(jnp.int8)
    sums = _product(node, x, kernel, fill=-less)
    if less:
        total = kernel.astype(jnp.int32).sum(range(kernel.ndim - 1))
        sums += less * total.reshape((1,) * (sums.ndim - 1) + (-1,))
    return sums


def _less(quantizer: Quantizer) -> int:
    """Returns what is subtracted from levels that int8 does not hold."""
    return HALF if quantizer.bounds[1] > 127 else 0


def _product(node: Node, x: jax.Array, kernel: jax.Array, fill: int) -> jax.Array:
    """Returns sums over the positions of the kernel; what pads the input has the level `fill`."""
    if node.op == "dense":
        return _multiply(x, kernel)
    (stride, groups, padding), size = _options(node), kernel.shape[0]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill)
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    parts = [
        x[:, places(i, height, stride), places(j, width, stride)] for i, j in np.ndindex(size, size)
    ]
    if kernel.shape[2:] == (1, groups):  # depthwise: no sum over channels
        kinds = jnp.float32 if x.dtype == jnp.float32 else jnp.int32
        rows = kernel.reshape(size * size, 1, 1, 1, groups).astype(kinds)
        return sum(part.astype(kinds) * row for part, row in zip(parts, rows, strict=True))
    if groups == 1:
        return _multiply(jnp.concatenate(parts, axis=-1), kernel.reshape(-1, kernel.shape[-1]))
    parts = [part.reshape(*part.shape[:-1], groups, -1) for part in parts]
    rows = jnp.moveaxis(jnp.concatenate(parts, axis=-1), 3, 0)  # groups first
    kernels = jnp.stack(jnp.split(kernel.reshape(-1, kernel.shape[-1]), groups, axis=-1))
    sums = _multiply(rows.reshape(groups, -1, rows.shape[-1]), kernels)
    sums = jnp.moveaxis(sums.reshape(*rows.shape[:-1], -1), 0, 3)
    return sums.reshape(*sums.shape[:3], -1)


def _options(node: Node) -> tuple[int, int, executor.Padding]:
    return tuple(node.options[key] for key in ("stride", "groups", "padding"))


def _multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the product of matrices; of integers, summed in 32 bits."""
    if x.dtype == jnp.int8:
        return jnp.matmul(x, y, preferred_element_type=jnp.int32)
    return jnp.matmul(x, y, precision="highest")


def _float_layer(node: Node, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the output of a layer whose input, the image, is not quantized."""
    y = _product(node, x, kernel.astype(jnp.float32), fill=0)
    y = y * node.kernel.step
    return y + node.arrays["bias"] if "bias" in node.arrays else y


def matrix_product(node: Node, x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiplies integers where no input is shifted, else the values that they represent."""
    quantizers = node.quantizer, node.other
    both = [executor.quantize(v, q, jnp) for v, q in zip((x, y), quantizers, strict=True)]
    if any(quantizer.shift for quantizer in quantizers):
        real = [
            levels * np.float32(quantizer.step) - np.float32(quantizer.shift)
            for levels, quantizer in zip(both, quantizers, strict=True)
        ]
        return _multiply(*real)
    less = [_less(quantizer) for quantizer in quantizers]
    left, right = (
        (levels - offset).astype(jnp.int8) for levels, offset in zip(both, less, strict=True)
    )
    # (l + a) (r + b) = l r + a r + (l + a) b, summed over the columns of the left one.
    sums = _multiply(left, right)
    sums += less[0] * right.astype(jnp.int32).sum(-2, keepdims=True)
    sums += less[1] * both[0].sum(-1, keepdims=True)
    return sums * (np.float32(node.quantizer.step) * np.float32(node.other.step))
