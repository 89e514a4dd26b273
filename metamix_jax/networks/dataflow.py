"""Lower bounds of a traced network's values, and what they depend on, by walking its jaxpr.

A quantizer without negative levels has twice as many for the same width, so it matters whether a
layer's input can be negative, and how far: ReLU gives at least 0, hswish -3/8, SiLU -0.278. The
bounds follow from interval arithmetic and, for chains of elementwise operations on one value (as
activation functions are), from evaluating the chain on a grid. They hold for every input up to the
grid's fineness; a function that turns between two of its points would be bounded too tightly, and
its values there clipped.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

_INFINITE = (-math.inf, math.inf)
_NEAR = 32.0  # where activation functions turn
_STEP = 2.0**-9  # of the grid there, which contains -1.5, where hswish is least
# Functions of scaled values turn closer to 0.
_SMALL = np.geomspace(1e-6, _NEAR, 4096)
_FAR = np.float32([1e2, 1e3, 1e4, 1e6, 1e8, 1e12])  # the last two tell whether it goes on

SAME = frozenset({
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "rev", "copy",
    "convert_element_type", "stop_gradient", "reduce_max", "reduce_min", "reduce_precision",
    "dynamic_slice", "gather", "reduce_window_max", "optimization_barrier", "sharding_constraint",
    "split", "sort", "cummax", "cummin",
})  # fmt: skip
ELEMENTWISE = frozenset({
    "add", "add_any", "sub", "mul", "div", "max", "min", "neg", "exp", "exp2", "expm1", "log",
    "log1p", "logistic", "tanh", "erf", "erfc", "abs", "sign", "sqrt", "rsqrt", "cbrt", "square",
    "integer_pow", "pow", "clamp", "select_n", "ge", "gt", "le", "lt", "eq", "ne", "and", "or",
    "not", "floor", "ceil", "round", "convert_element_type", "stop_gradient", "copy",
})  # fmt: skip
CALLS = {  # primitive -> the parameter that holds the called jaxpr
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}  # fmt: skip


def called(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """Returns the jaxpr that a call evaluates with its own operands; None of other equations."""
    key = CALLS.get(eqn.primitive.name)
    inner = eqn.params.get(key) if key else None
    return ClosedJaxpr(inner, ()) if isinstance(inner, Jaxpr) else inner


@dataclasses.dataclass(eq=False)
class Value:
    """What is known of a value.

    interval: lower and upper bound of every element; with a chain, see `bounds`.
    image: whether it depends on the image; otherwise only on weights, statistics and constants.
    weights: the leaves of params that it depends on.
    below: the layers that it depends on without another layer in between.
    constant: the one number in it, if that is known.
    chain: (root, function) if it is function(root), element by element.
    """

    interval: tuple[float, float] = _INFINITE
    image: bool = False
    weights: frozenset[str] = frozenset()
    below: frozenset[str] = frozenset()
    constant: float | None = None
    chain: tuple["Value", Callable[[Any], Any]] | None = None

    @functools.cached_property
    def bounds(self) -> tuple[float, float]:
        """The lower and upper bound of every element; a chain is evaluated once, when asked."""
        if self.chain is None:
            return self.interval
        root, function = self.chain
        return _range_on_grid(function, root.interval)


def constant(number: Any) -> Value:
    """Returns the value of an array that is known."""
    array = np.asarray(number) if not isinstance(number, jax.core.Tracer) else None
    if array is None or array.dtype.kind not in "fiub" or not array.size:
        return Value()
    low, high = float(array.min()), float(array.max())
    return Value((low, high), constant=low if low == high else None)


def walk(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    arguments: Sequence[Value],
    visit: Callable[[JaxprEqn, list[Value]], list[Value] | None],
) -> list[Value]:
    """Returns what is known of the outputs.

    Args:
      jaxpr: of the network.
      consts: its constants.
      arguments: what is known of its inputs.
      visit: called with every equation and its operands, calls before their content; returns what
        is known of the results, or None for what follows from the operation.
    """
    known = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))
    for eqn in jaxpr.eqns:
        operands = [constant(v.val) if isinstance(v, Literal) else known[v] for v in eqn.invars]
        results, inner = visit(eqn, operands), called(eqn)
        if results is None and inner is not None and len(inner.jaxpr.invars) == len(operands):
            results = walk(inner.jaxpr, inner.consts, operands, visit)
        elif results is None:
            results = _results(eqn, operands)
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [constant(v.val) if isinstance(v, Literal) else known[v] for v in jaxpr.outvars]


def _results(eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Returns what follows from the operation for its results."""
    name = eqn.primitive.name
    facts = {
        "image": any(value.image for value in operands),
        "weights": frozenset().union(*(value.weights for value in operands)),
        "below": frozenset().union(*(value.below for value in operands)),
    }
    if name in ELEMENTWISE and (chain := _chained(eqn, operands)):
        root, function = chain
        return [Value(chain=(root, function), **facts) if root else _evaluated(function)]
    number = operands[0].constant if name in SAME and len(operands) == 1 else None
    interval = _interval(name, eqn, operands)
    return [Value(interval, constant=number, **facts) for _ in eqn.outvars]


def _evaluated(function: Callable[[Any], Any]) -> Value:
    """Returns the value of a function that does not depend on its argument."""
    with jax.ensure_compile_time_eval():
        return constant(function(jnp.zeros(1)))


def _chained(
    eqn: JaxprEqn, operands: list[Value]
) -> tuple[Value | None, Callable[[Any], Any]] | None:
    """Returns root and function of an elementwise operation on one value and constants.

    The root is None if there are constants alone; the result None if there are several values.
    """
    if eqn.params.get("sharding") is not None or len(eqn.outvars) != 1:
        return None
    roots, functions = [], []
    for value in operands:
        if value.constant is not None:
            functions.append(functools.partial(_filled, value.constant))
            continue
        root, function = value.chain or (value, lambda x: x)
        roots.append(root)
        functions.append(function)
    if any(root is not roots[0] for root in roots):
        return None

    def function(x: Any) -> Any:
        inputs = [apply(x) for apply in functions]
        inputs = [
            jnp.asarray(value, v.aval.dtype) for value, v in zip(inputs, eqn.invars, strict=True)
        ]
        shape = jnp.broadcast_shapes(*(value.shape for value in inputs))
        inputs = [jnp.broadcast_to(value, shape) for value in inputs]
        return eqn.primitive.bind(*inputs, **eqn.params)

    return (roots[0] if roots else None), function


def _filled(number: float, x: Any) -> Any:
    return jnp.full_like(x, number)


def _range_on_grid(
    function: Callable[[Any], Any], interval: tuple[float, float]
) -> tuple[float, float]:
    """Returns the least and the greatest value of a function over an interval.

    Where the function still falls (or rises) at the end of an infinite interval, the bound is
    infinite.
    """
    low, high = interval
    left = low if math.isfinite(low) else min(-_NEAR, high - 2 * _NEAR)
    right = high if math.isfinite(high) else max(_NEAR, left + 2 * _NEAR)
    near = np.clip(np.arange(-_NEAR, _NEAR + _STEP, _STEP), left, right)
    small = np.clip(np.concatenate([-_SMALL, _SMALL]), left, right)
    parts = [np.array([left, right]), np.linspace(left, right, 4096), near, small]
    ends = [side * _FAR for side, limit in ((-1, low), (1, high)) if math.isinf(limit)]
    try:
        with jax.ensure_compile_time_eval():
            values = [
                np.asarray(function(jnp.asarray(x, jnp.float32)), np.float64)
                for x in (np.concatenate(parts), *ends)
            ]
    except Exception:  # an operation that does not take a plain vector
        return _INFINITE
    found = np.concatenate(values)
    found = found[np.isfinite(found)]
    least, greatest = float(found.min(initial=math.inf)), float(found.max(initial=-math.inf))
    for row in values[1:]:
        before, last = row[-2:]
        if not np.isfinite(row[-2:]).all():  # overflow to one side, or not a number
            least = least if last == math.inf else -math.inf
            greatest = greatest if last == -math.inf else math.inf
            continue
        slack = 1e-6 * max(1.0, abs(before))
        least = least if last >= before - slack else -math.inf
        greatest = greatest if last <= before + slack else math.inf
    return (least, greatest) if least <= greatest else _INFINITE


def _interval(name: str, eqn: JaxprEqn, operands: list[Value]) -> tuple[float, float]:
    """Returns bounds of the results of an operation on several values, or across positions."""
    if name in SAME:
        return operands[0].bounds
    if name in _ARITHMETIC:
        return _ARITHMETIC[name](*(value.bounds for value in operands))
    if name in ("concatenate", "select_n", "pad", "dynamic_update_slice", "scatter"):
        values = operands[1:] if name == "select_n" else operands
        bounds = [value.bounds for value in values]
        return min(low for low, _ in bounds), max(high for _, high in bounds)
    if name in ("reduce_sum", "reduce_window_sum", "cumsum"):
        count = _summed(eqn)
        low, high = operands[0].bounds
        return _scaled(min(low, 0.0), count), _scaled(max(high, 0.0), count)
    return _INFINITE


def _summed(eqn: JaxprEqn) -> int:
    """Returns how many numbers are added up into one."""
    shape = eqn.invars[0].aval.shape
    if eqn.primitive.name == "reduce_sum":
        return math.prod(shape[axis] for axis in eqn.params["axes"])
    if eqn.primitive.name == "reduce_window_sum":
        return math.prod(eqn.params["window_dimensions"])
    return shape[eqn.params["axis"]]


def _scaled(bound: float, count: int) -> float:
    return bound * count if bound else 0.0


def _times(a: float, b: float) -> float:
    return 0.0 if 0.0 in (a, b) else a * b


def _multiply(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    corners = [_times(x, y) for x in a for y in b]
    return min(corners), max(corners)


def _divide(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    if b[0] < 0:
        return _INFINITE
    inverse = (1 / b[1] if b[1] else math.inf, 1 / b[0] if b[0] else math.inf)
    return _multiply(a, inverse)


_ARITHMETIC: Mapping[str, Callable[..., tuple[float, float]]] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "add_any": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "mul": _multiply,
    "div": _divide,
    "max": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "min": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
}
