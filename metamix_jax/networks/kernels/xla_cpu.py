"""Barriers against fusion and CSE in XLA:CPU, and rematerialised gradients.

XLA:CPU fuses cheap producers into all their consumers, however slow that makes them, and its CSE
merges a gradient's recomputation with the original, so that the values are kept after all. It
removes optimization_barrier before both passes, but not a call that must not be inlined.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata


def materialised(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the arrays; on CPU, all are computed before any consumer runs."""
    return jax.lax.platform_dependent(*arrays, cpu=_called, default=lambda *same: same)


def _called(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    with set_xla_metadata(inlineable="false"):
        return _barrier(*arrays)


@jax.jit
def _barrier(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return jax.lax.optimization_barrier(arrays)  # keeps JAX from eliding an identity call


def keeping_arguments(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `function` with a gradient that saves only its arguments and recomputes the rest."""

    @jax.custom_vjp
    def run(*arguments: jax.Array) -> jax.Array:
        return function(*arguments)

    def forward(*arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        arguments = materialised(*arguments)
        return function(*arguments), arguments

    def backward(arguments: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[Any, ...]:
        *arguments, cotangent = materialised(*arguments, cotangent)
        floating = [jnp.issubdtype(argument.dtype, jnp.floating) for argument in arguments]

        def of_floating(*chosen: jax.Array) -> jax.Array:
            rest = iter(chosen)
            pairs = zip(floating, arguments, strict=True)
            return function(*(next(rest) if is_float else fixed for is_float, fixed in pairs))

        chosen = [a for is_float, a in zip(floating, arguments, strict=True) if is_float]
        grads = iter(jax.vjp(of_floating, *chosen)[1](cotangent))
        return tuple(next(grads) if is_float else None for is_float in floating)

    run.defvjp(forward, backward)
    return run
