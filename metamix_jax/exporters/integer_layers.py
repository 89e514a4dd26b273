"""What a layer computes on integers, whatever file it is written to.

Its input is read at the layer's own levels, and kernel and bias are rounded to fit them.
"""

from typing import NamedTuple

import numpy as np

from metamix_jax.exporters.graph import Node
from metamix_jax.exporters.integer_plan import GATE_FROM, Plan, Step, Storage, levels_of

MOST_BIAS = 2.0**30  # of int32
MOST_INT8 = 127


class Reading(NamedTuple):
    """How a layer reads the levels of its input.

    read: what they are read as, to be written at `storage`; None: they are that already.
    storage: of the levels that the layer multiplies.
    shift: added before they were taken.
    """

    read: Storage | None
    storage: Storage
    shift: float


class Integers(NamedTuple):
    """A kernel and a bias.

    levels, factor: int8 [..., features]; the kernel is their product, times `step`.
    step: float32 [features].
    bias: int32 [features], in units of `product`, the step of input and kernel.
    """

    levels: np.ndarray
    factor: int
    step: np.ndarray
    bias: np.ndarray
    product: np.ndarray


def reading(node: Node, plan: Plan) -> Reading:
    """Returns how a layer reads its input."""
    (name,), quantizer = node.inputs, node.quantizer
    stored = plan.storage[name]
    if quantizer is None or name not in plan.streams:  # None: an image at full precision
        return Reading(None, stored, 0.0)
    read = stored._replace(zero=stored.zero - round(quantizer.shift / stored.step))
    return Reading(read, levels_of(quantizer), quantizer.shift)


def integers(
    step: Step, found: Reading, most_product: int | None = None
) -> tuple[Integers, Storage]:
    """Returns a layer's kernel and bias, and how the levels of its input are to be read.

    The bias is in units of both steps, too coarse at few bits. So kernels are multiples of their
    levels, up to what int8 holds.

    Args:
      step: the layer.
      found: how it reads its input.
      most_product: of an input's level and twice a kernel's, where sums have 16 bits.
    """
    node, (_, storage, shift) = step.node, found
    if shift and node.op == "conv" and np.any(node.options["padding"]):
        # Padding represents 0, which only a level can; inside, the bias corrects the rest.
        storage = storage._replace(zero=round(shift / storage.step))
        shift -= storage.zero * storage.step
    sums = step.levels.reshape(-1, step.levels.shape[-1]).sum(axis=0, dtype=np.int64)
    bias = step.bias - shift * sums * step.step
    largest = max(int(np.abs(step.levels).max(initial=0)), 1)
    most = MOST_INT8 if most_product is None else min(MOST_INT8, most_product // (2 * storage.high))
    factor = max(1, most // largest)
    least = np.maximum(np.abs(bias) / (MOST_BIAS * storage.step), np.finfo(np.float32).tiny)
    own = np.float32(np.maximum(step.step / factor, least))
    # Only channels that are nearly constant have other steps than their own.
    levels = np.rint(step.levels * (step.step / factor / own)).astype(np.int8)
    product = own * np.float32(storage.step)
    rounded = np.rint(bias / product).astype(np.int32)
    return Integers(levels, factor, own, rounded, product), storage


def gate_read(stored: Storage) -> Storage:
    """Returns how levels of x are read as x / 6 + 1 / 2, the inside of a hard sigmoid."""
    return Storage(stored.step / (2 * GATE_FROM), stored.zero - round(GATE_FROM / stored.step))
