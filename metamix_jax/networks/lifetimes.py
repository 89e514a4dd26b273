"""Which activations are kept at the same time, found by walking a traced network's jaxpr.

While a layer runs, its input, its output and all that later operations need are kept. A tensor that
one layer alone takes is stored at the width of that layer's input, any other in 8 bits, as in the
exported files (exporters/integer_plan.py). What lies between a layer and the tensor that is stored
(batch norm, activation functions) is computed as the layer's output leaves it, and takes nothing.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal

from metamix_jax.networks.dataflow import ELEMENTWISE, called
from metamix_jax.networks.tracing import PRODUCTS, Site, Trace

RENAMED = frozenset({
    "reshape", "transpose", "squeeze", "expand_dims", "copy", "stop_gradient", "broadcast_in_dim",
    "convert_element_type", "optimization_barrier", "sharding_constraint", "reduce_precision",
})  # fmt: skip


class Moment(NamedTuple):
    """What is kept while one layer runs, in elements of one image.

    layer: that runs.
    own: layer -> elements stored at the width of its input.
    rest: elements stored in 8 bits.
    """

    layer: str
    own: Mapping[str, int]
    rest: int


@dataclasses.dataclass
class _Operation:
    """An equation on tensors that depend on the image.

    layer: its name, "" if it is none; `first` is what it takes at its width.
    """

    name: str
    inputs: list[int]
    outputs: list[int]
    layer: str = ""
    first: int | None = None


class _Walk:
    """Numbers the tensors that depend on the image; `elements` has their sizes."""

    def __init__(self, sites: Sequence[Site | None]):
        self.elements: list[int] = []
        self.operations: list[_Operation] = []
        self._sites = iter(sites)

    def tensor(self, elements: int) -> int:
        """Returns the number of a new tensor."""
        self.elements.append(elements)
        return len(self.elements) - 1

    def run(self, jaxpr: Jaxpr, arguments: Sequence[int | None]) -> list[int | None]:
        """Walks a jaxpr; tensors that do not depend on the image are None."""
        known = dict.fromkeys(jaxpr.constvars) | dict(zip(jaxpr.invars, arguments, strict=True))
        for eqn in jaxpr.eqns:
            operands = [None if isinstance(v, Literal) else known[v] for v in eqn.invars]
            inner = called(eqn)
            if inner is not None and len(inner.jaxpr.invars) == len(operands):
                results = self.run(inner.jaxpr, operands)
            else:
                results = self._results(eqn, operands)
            known |= dict(zip(eqn.outvars, results, strict=True))
        return [None if isinstance(v, Literal) else known[v] for v in jaxpr.outvars]

    def _results(self, eqn: JaxprEqn, operands: list[int | None]) -> list[int | None]:
        name = eqn.primitive.name
        site = next(self._sites) if name in PRODUCTS else None
        inputs = [x for x in operands if x is not None]
        if not inputs:
            return [None] * len(eqn.outvars)
        sizes = [math.prod(v.aval.shape) for v in eqn.outvars]
        if name in RENAMED and sizes == [self.elements[inputs[0]]]:
            return inputs[:1]
        outputs = [self.tensor(size) for size in sizes]
        operation = _Operation(name, inputs, outputs)
        if site is not None:
            # The second of two inputs has other widths, which are not searched.
            operation.layer, operation.first = site.layer, inputs[0]
        self.operations.append(operation)
        return outputs


def moments(trace: Trace, arguments: Sequence[bool], image_elements: int) -> tuple[Moment, ...]:
    """Returns what is kept while each layer runs, in order.

    Args:
      trace: of one image.
      arguments: for each input of the jaxpr, whether it is the image.
      image_elements: numbers in the image.
    """
    walk = _Walk(trace.sites)
    image = walk.tensor(image_elements)
    scores = walk.run(trace.jaxpr.jaxpr, [image if own else None for own in arguments])
    operations = walk.operations
    last = {tensor: len(operations) for tensor in scores if tensor is not None}
    made = {image: -1}
    for number, operation in enumerate(operations):
        for tensor in operation.inputs:
            last[tensor] = max(last.get(tensor, 0), number)
        made |= dict.fromkeys(operation.outputs, number)
    found = []
    for number, operation in enumerate(operations):
        if not operation.layer:
            continue
        own: dict[str, int] = collections.defaultdict(int)
        rest = 0
        for tensor in made:
            if made[tensor] <= number <= last.get(tensor, -1):
                taker = _taker(tensor, operations)
                if taker:
                    own[taker] += walk.elements[tensor]
                else:
                    rest += walk.elements[tensor]
        found.append(Moment(operation.layer, dict(own), rest))
    return tuple(found)


def _taker(tensor: int, operations: Sequence[_Operation]) -> str:
    """Returns the one layer that takes a tensor, perhaps through functions of it; "" if none."""
    same, takers = {tensor}, set()
    for operation in operations:
        taken = same & set(operation.inputs)
        if taken and operation.name in ELEMENTWISE and taken == set(operation.inputs):
            same |= set(operation.outputs)
        elif taken:
            takers.add(operation.layer if operation.inputs.count(operation.first) == 1
                       and taken == {operation.first} else "")  # fmt: skip
    return takers.pop() if len(takers) == 1 else ""
