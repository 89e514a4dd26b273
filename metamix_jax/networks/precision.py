"""Bit-widths: a layer's candidates, its precision in a forward pass and its static cost."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from flax import struct

FULL_BITS = 32  # means "not quantized"


class Bits(NamedTuple):
    """A layer's activation and weight bit-widths; each branch has one such pair."""

    act: int
    weight: int


def bit_candidates(act_bits: Sequence[int], weight_bits: Sequence[int]) -> tuple[Bits, ...]:
    """Returns all pairs in branch order: activation widths outermost, weight widths innermost."""
    return tuple(Bits(*pair) for pair in itertools.product(act_bits, weight_bits))


@struct.dataclass
class Precision:
    """How all quantized layers run in one forward pass.

    activations: "full" (not quantized); an int k (branch k everywhere); "mixture" (softmax over the
      branches, Eq. 2); "chosen" (branch `branches[layer path]`, other branches cost nothing);
      "calibrate" (not quantized, step sizes initialized from each layer's input);
      "calibrate_lowest" (the same, but each layer's input is quantized at the lowest width).
    weights: "full", "quantized" (with several candidate widths: at that of the branch) or
      "calibrate" (not quantized, step sizes initialized).
    branches: layer path -> index of the chosen branch, int32 scalars; may be traced.
    temperature: of the mixture's softmax, a float32 scalar; None: 1.
    """

    activations: str | int = struct.field(pytree_node=False, default="full")
    weights: str = struct.field(pytree_node=False, default="full")
    branches: Mapping[str, jax.Array] | None = None
    temperature: jax.Array | None = None

    def at_temperature(self, logits: jax.Array) -> jax.Array:
        """Returns the logits whose softmax are the shares of the branches."""
        return logits if self.temperature is None else logits / self.temperature


FULL = Precision()


@struct.dataclass
class LayerCost:
    """Static properties of one quantized layer, per image; a pytree without leaves."""

    macs: int = struct.field(pytree_node=False)  # multiply-accumulates
    act_elements: int = struct.field(pytree_node=False)  # input activations
    weight_elements: int = struct.field(pytree_node=False)  # of the kernel
    act_bits: tuple[int, ...] = struct.field(pytree_node=False)  # candidates; one entry = fixed
    weight_bits: tuple[int, ...] = struct.field(pytree_node=False)  # likewise

    @property
    def candidates(self) -> tuple[Bits, ...]:
        """The bit-widths of each branch."""
        return bit_candidates(self.act_bits, self.weight_bits)

    @property
    def searched(self) -> bool:
        """Whether the layer has more than one candidate."""
        return len(self.candidates) > 1


@dataclasses.dataclass(frozen=True)
class QuantSettings:
    """Settings shared by all layers of a network; fields as in config.quant, rules for some."""

    act_bits: tuple[int, ...] = (8, 4, 3)
    weight_bits: tuple[int, ...] = (4,)
    first_last_bits: int = 8
    image_bits: int = 8
    init_rule: str = "shifted"
    positive_step: str = "floor"
    compute_dtype: str = "float32"  # config.compute_dtype
    rules: tuple[str, ...] = ()

    def fixed(self, bits: Bits) -> "QuantSettings":
        """Returns the settings of a layer that is not searched."""
        return dataclasses.replace(self, act_bits=(bits.act,), weight_bits=(bits.weight,))

    def ends(self) -> "QuantSettings":
        """Returns the settings of the last layer, whose bit-widths are fixed."""
        return self.fixed(Bits(self.first_last_bits, self.first_last_bits))

    def stem(self) -> "QuantSettings":
        """Returns the settings of the first layer, whose input is the image."""
        return dataclasses.replace(self.ends(), act_bits=(self.image_bits,))
