"""metamix_jax.load_policy(...) and the like, where names of modules are among the functions.

`metamix_jax.evaluate` and `metamix_jax.export` are modules, which Python binds to the package as
soon as anything imports them; so that they can be called at any time, they are modules that can be
called (docs.python.org/3/reference/datamodel.html#customizing-module-attribute-access).
"""

import importlib
import sys
import types
from typing import Any

MODULES = ("evaluate", "export")


def find(name: str) -> Any:
    """Returns the function or module that `metamix_jax.name` stands for."""
    if name in MODULES:
        return importlib.import_module(f"metamix_jax.{name}")
    return getattr(importlib.import_module("metamix_jax.library"), name)


class _CallableModule(types.ModuleType):
    """A module that, called, is the function of its name in library.py."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        library = importlib.import_module("metamix_jax.library")
        return getattr(library, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(module: str) -> None:
    """Lets the module of this full name be called."""
    sys.modules[module].__class__ = _CallableModule
