"""Arrays that XLA for CPUs computes once, and gradients that keep no more than they have to.

XLA for CPUs fuses cheap producers into all their consumers, however slow that makes these, and
shares what a gradient computes again with what was computed first, so that it is kept after all.
It takes an optimization_barrier away before both; a call that is not inlined stays.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata


def materialised(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the arrays; on a CPU nothing is computed from them before all of them are there."""
    return jax.lax.platform_dependent(*arrays, cpu=_called, default=lambda *same: same)


def _called(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    with set_xla_metadata(inlineable="false"):
        return _barrier(*arrays)


@jax.jit
def _barrier(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return jax.lax.optimization_barrier(arrays)  # lest JAX passes them on without a call


def keeping_arguments(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `function` of arrays with a gradient that computes all but its arguments again."""

    @jax.custom_vjp
    def run(*arguments: jax.Array) -> jax.Array:
        return function(*arguments)

    def forward(*arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        arguments = materialised(*arguments)
        return function(*arguments), arguments

    def backward(arguments: tuple[jax.Array, ...], slope: jax.Array) -> tuple[Any, ...]:
        *arguments, slope = materialised(*arguments, slope)
        smooth = [jnp.issubdtype(argument.dtype, jnp.floating) for argument in arguments]

        def of_smooth(*chosen: jax.Array) -> jax.Array:
            rest = iter(chosen)
            pairs = zip(smooth, arguments, strict=True)
            return function(*(next(rest) if is_smooth else fixed for is_smooth, fixed in pairs))

        chosen = [a for is_smooth, a in zip(smooth, arguments, strict=True) if is_smooth]
        slopes = iter(jax.vjp(of_smooth, *chosen)[1](slope))
        return tuple(next(slopes) if is_smooth else None for is_smooth in smooth)

    run.defvjp(forward, backward)
    return run
