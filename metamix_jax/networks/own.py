"""Networks of the user's own: config.model.name=FILE.py:NAME or MODULE:NAME.

NAME is a class of Linen or NNX modules, a function that returns one, or a Linen module. Fields of
config.model are its arguments, and `num_classes`, where it takes that.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from metamix_jax.errors import UserError, suggestion
from metamix_jax.networks.adapters import Adapter, LinenAdapter, NnxAdapter, NnxInstance
from metamix_jax.networks.intercepted import InterceptedNetwork
from metamix_jax.networks.precision import QuantSettings

_GIVEN = ("num_classes", "rngs", "parent", "name")  # arguments that are not fields of config.model
_HANDED_OVER = "given"  # in place of a module's name: a network that a Python program hands over
_PLAIN = (bool, int, float, str, tuple)  # types of fields


def is_own(name: str) -> bool:
    """Returns whether a name in config.model.name is that of a user's network."""
    return ":" in name


def given_name(model: nn.Module | nnx.Module) -> str:
    """Returns config.model.name of a network handed over by a Python program."""
    if not isinstance(model, nn.Module | nnx.Module):
        raise UserError(f"model: a {type(model).__name__}; expected a Linen or NNX module")
    return f"{_HANDED_OVER}:{type(model).__name__}"


def variables_of(model: nn.Module | nnx.Module | None) -> dict[str, Any] | None:
    """Returns the variables that a network carries itself: those of NNX, None otherwise."""
    return instance(model).variables() if isinstance(model, nnx.Module) else None


def instance(model: nn.Module | nnx.Module) -> Adapter:
    """Returns the adapter of a network that exists already."""
    if isinstance(model, nn.Module):
        return LinenAdapter(model)
    return NnxInstance(model)


def label(name: str) -> str:
    """Returns the name to show."""
    return name.rpartition(":")[2]


def source_files(*names: str) -> tuple[Path, ...]:
    """Returns the files that define the networks among `names` that are a user's own."""
    return tuple(path for name in names if is_own(name) if (path := source_file(name)))


def source_file(name: str) -> Path | None:
    """Returns the file that defines a user's network; None if it is not a file of Python."""
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place).expanduser()
    origin = getattr(sys.modules.get(place), "__file__", None)
    return Path(origin) if origin else None


def fields(name: str, source: str = "config.model") -> dict[str, Any]:
    """Returns the arguments that have a plain default; those without one are None."""
    parameters = _arguments(_load(name, source))
    found = {}
    for key, parameter in parameters.items():
        if key in _GIVEN or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.default is parameter.empty:
            found[key] = None
        elif isinstance(parameter.default, _PLAIN):
            found[key] = parameter.default
    return found


def make(
    name: str,
    given: Mapping[str, Any],
    num_classes: int,
    settings: QuantSettings,
    image_shape: tuple[int, int, int],
    source: str = "config.model",
    model: nn.Module | nnx.Module | None = None,
) -> InterceptedNetwork:
    """Returns a user's network with its products quantized.

    Args:
      name: FILE.py:NAME or MODULE:NAME.
      given: its arguments.
      num_classes: likewise, where it has such an argument; and the scores it must return.
      settings: of the quantizers.
      image_shape: (height, width, channels).
      source: the section that describes it.
      model: the network itself, where it is handed over.

    Raises:
      UserError: there is no such network, its arguments do not fit, it does not return the scores,
        or has layers that cannot be quantized.
    """
    network = _adapter(name, given, num_classes, source) if model is None else instance(model)
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(network.init, key, images)
    scores, _ = jax.eval_shape(
        lambda variables, x: network.apply(variables, x, False, None), variables, images
    )
    if getattr(scores, "shape", None) != (2, num_classes):
        found = getattr(scores, "shape", type(scores).__name__)
        raise UserError(
            f"{source}.name={name!r}: returns {found} for 2 images of {image_shape}; expected "
            f"scores of shape (2, {num_classes})"
        )
    model = InterceptedNetwork(network, num_classes, settings, network.momentum(images))
    model.layers(variables, images)
    return model


def _adapter(name: str, given: Mapping[str, Any], num_classes: int, source: str) -> Adapter:
    kind = _load(name, source)
    if isinstance(kind, nn.Module):
        if given:
            raise UserError(f"{source}.{next(iter(given))}: {name} is a module, without arguments")
        return LinenAdapter(kind)
    known = _arguments(kind)
    takes_all = any(p.kind == p.VAR_KEYWORD for p in known.values())
    for key in given:
        if key not in known and not takes_all:
            hint = suggestion(key, set(known) - set(_GIVEN))
            raise UserError(f"{source}.{key}: {name} has no such argument; {hint}")
    if "num_classes" in known:
        given = {"num_classes": num_classes} | dict(given)
    for key, parameter in known.items():
        if (
            parameter.default is parameter.empty
            and key not in (*given, "rngs")
            and (parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY))
        ):
            raise UserError(f"{source}.name={name!r}: needs {key!r}; set {source}.{key}")
    if "rngs" in known:
        return NnxAdapter(functools.partial(kind, **given), label(name))
    module = kind(**given)
    if not isinstance(module, nn.Module):
        raise UserError(
            f"{source}.name={name!r}: {label(name)} gives a {type(module).__name__}; expected a "
            "Linen or NNX module (of NNX, with an argument `rngs`)"
        )
    return LinenAdapter(module)


def _arguments(kind: Any) -> Mapping[str, inspect.Parameter]:
    if isinstance(kind, nn.Module):
        return {}
    # The signature of an NNX class is that of its metaclass.
    known = inspect.signature(kind.__init__ if isinstance(kind, type) else kind).parameters
    hidden = ("self", "parent", "name") if isinstance(kind, type) else ()
    return {key: value for key, value in known.items() if key not in hidden}


def _load(name: str, source: str) -> Callable[..., Any] | nn.Module:
    place, _, attribute = name.rpartition(":")
    if place == _HANDED_OVER:
        raise UserError(
            f"{source}.name={name!r}: this network was given from Python; give it again, as `model`"
        )
    module = _module(place, name, source)
    if not hasattr(module, attribute):
        classes = [key for key, value in vars(module).items() if _is_network(value)]
        hint = suggestion(attribute, classes)
        raise UserError(f"{source}.name={name!r}: {place} has no {attribute!r}; {hint}")
    found = getattr(module, attribute)
    if not (callable(found) or isinstance(found, nn.Module)):
        raise UserError(
            f"{source}.name={name!r}: a {type(found).__name__}; expected a Linen or NNX class"
        )
    return found


def _is_network(value: Any) -> bool:
    return isinstance(value, nn.Module) or (
        isinstance(value, type) and issubclass(value, nn.Module | nnx.Module)
        and value not in (nn.Module, nnx.Module)
    )  # fmt: skip


@functools.cache
def _module(place: str, name: str, source: str) -> Any:
    """Returns the module of a file or name; errors inside it keep their traceback."""
    if place.endswith(".py"):
        path = Path(place).expanduser()
        if not path.is_file():
            raise UserError(f"{source}.name={name!r}: no such file as {place}")
        spec = importlib.util.spec_from_file_location(f"metamix_jax_own_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # needed by dataclasses, which Linen modules are
        spec.loader.exec_module(module)
        return module
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # of something that the module imports
        raise UserError(
            f"{source}.name={name!r}: no module {place!r}; expected FILE.py:NAME, or a module that "
            "can be imported from here"
        ) from error
