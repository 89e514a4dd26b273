"""Builds the exported graph from a trained network and its policy."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from metamix_jax.errors import UserError
from metamix_jax.exporters.graph import Graph, Node, Quantizer, result_shape
from metamix_jax.exporters.integers import integer_kernel, step_sizes
from metamix_jax.exporters.lowering import lower
from metamix_jax.networks import registry
from metamix_jax.networks.drawing import IMAGE
from metamix_jax.networks.intercepted import InterceptedNetwork
from metamix_jax.networks.layers import QuantConv, QuantDense, side_padding
from metamix_jax.networks.precision import FULL_BITS, Bits
from metamix_jax.selection.cost import LayerCosts
from metamix_jax.selection.policy import Policy


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A module's fields and the shapes of its call.

    fields: those of the module, and its type.
    input_shape, output_shape: without the batch.
    """

    fields: Mapping[str, Any]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def build_graph(
    model: nn.Module,
    variables: Mapping[str, Any],
    policy: Policy,
    *,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Graph:
    """Returns the network at its policy's widths, with integer kernels and batch norm folded.

    Args:
      model: a network of `metamix_jax.networks.registry`.
      variables: params, batch_stats and quant.
      policy: the bits of all layers.
      image_shape: (height, width, channels).
      mean: of pixels in [0, 1], one per channel or one for all.
      std: standard deviation, likewise.

    Raises:
      UserError: the network cannot be exported.
    """
    nodes = _nodes(model, variables, policy.bits, image_shape)
    return Graph(
        model=policy.model,
        image_shape=tuple(image_shape),
        num_classes=model.num_classes,
        mean=tuple(mean),
        std=tuple(std),
        policy=policy.to_json(),
        nodes=nodes,
    )


def _nodes(
    model: nn.Module,
    variables: Mapping[str, Any],
    bits: Mapping[str, Bits],
    image_shape: tuple[int, int, int],
) -> tuple[Node, ...]:
    if isinstance(model, InterceptedNetwork):
        return lower(model, variables, bits, image_shape)
    architecture = registry.architecture_of(model)
    if architecture.draw is None:
        raise UserError(_undrawn(model))
    drawing = _Drawing(
        record_modules(model, variables, image_shape),
        jax.tree.map(np.asarray, variables),
        bits,
        image_shape,
    )
    architecture.draw(model, drawing)
    return tuple(drawing.nodes)


def obstacle(model: nn.Module, costs: LayerCosts, image_shape: tuple[int, int, int]) -> str:
    """Returns why a network cannot be exported, "" if it can; needs no trained variables."""
    if not isinstance(model, InterceptedNetwork):
        return "" if registry.exportable(model) else _undrawn(model)
    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, keys, images)
    variables = {
        name: jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes.get(name, {}))
        for name in ("params", "batch_stats", "quant")
    }
    bits = {path: layer.candidates[0] for path, layer in costs.items()}
    try:
        lower(model, variables, bits, image_shape, values=False)
    except UserError as error:
        return str(error)
    return ""


def _undrawn(model: nn.Module) -> str:
    return (
        f"config.model.name={registry.architecture_of(model).name!r}: cannot be exported; expected "
        "a network whose file in networks/zoo/ defines `draw`"
    )


def record_modules(
    model: nn.Module, variables: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> dict[str, Recorded]:
    """Returns path -> Recorded for every layer and batch norm, without computing anything."""
    recorded = {}

    def record(call, args, kwargs, context):
        result = call(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.path:
            names = {field.name for field in dataclasses.fields(module)} - {"parent", "name"}
            fields = {name: getattr(module, name) for name in names}
            shapes = args[0].shape[1:], result.shape[1:]
            recorded["/".join(module.path)] = Recorded({"type": type(module), **fields}, *shapes)
        return result

    with nn.intercept_methods(record):
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), dict(variables), images)
    return recorded


class _Drawing:
    """Collects the nodes; see `networks.drawing.Drawing`."""

    def __init__(
        self,
        modules: Mapping[str, Recorded],
        variables: Mapping[str, Any],
        bits: Mapping[str, Bits],
        image_shape: tuple[int, ...],
    ):
        self.nodes: list[Node] = []
        self._modules, self._variables, self._bits = modules, variables, bits
        self._shapes = {IMAGE: tuple(image_shape)}

    def has(self, path: str) -> bool:
        return path in self._modules

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self._shapes[tensor]

    def layer(self, tensor: str, path: str, norm: str = "", activation: str = "") -> str:
        module, params, quant = (
            self._modules[path],
            self._of("params", path),
            self._of("quant", path),
        )
        assert module.input_shape == self.shape(tensor), f"{path} does not take {tensor}"
        result = self._add(
            "conv" if module.fields["type"] is QuantConv else "dense",
            path,
            (tensor,),
            options=_conv_options(module),
            arrays=_bias(params),
            quantizer=_quantizer(module, quant, self._bits[path]),
            kernel=integer_kernel(
                module.fields["settings"],
                params["kernel"],
                quant["weight_step"],
                self._bits[path].weight,
            ),
        )
        assert module.output_shape == self.shape(result), f"{path} has shape {module.output_shape}"
        if norm:
            statistics = self._of("batch_stats", norm)
            folded = _fold(self._modules[norm], self._of("params", norm), statistics)
            result = self._add("affine", norm, (result,), arrays=folded)
        return self.node(activation, result) if activation else result

    def node(self, op: str, *tensors: str, **options: Any) -> str:
        if op == "max_pool":
            size, stride, kind = options["size"], options["stride"], options["padding"]
            sides = self.shape(tensors[0])[:2]
            padding = tuple(side_padding(side, size, stride, kind) for side in sides)
            options = options | {"padding": padding}
        return self._add(op, f"{tensors[-1]}/{op}", tensors, options=options)

    def _add(self, op: str, name: str, inputs: tuple[str, ...], **facts: Any) -> str:
        assert name not in self._shapes, f"two nodes called {name}"
        node = Node(op, name, inputs, shape=(), **facts)
        shape = result_shape(node, [self.shape(tensor) for tensor in inputs])
        self.nodes.append(dataclasses.replace(node, shape=shape))
        self._shapes[name] = shape
        return name

    def _of(self, collection: str, path: str) -> Mapping[str, np.ndarray]:
        found = self._variables[collection]
        for key in path.split("/"):
            found = found.get(key, {})  # a layer at 32 bits has no quantization state
        return found


def _conv_options(module: Recorded) -> dict[str, Any]:
    if module.fields["type"] is QuantDense:
        return {}
    size, stride = module.fields["kernel_size"], module.fields["stride"]
    sides, kind = module.input_shape[:2], module.fields["padding"]
    return {
        "stride": stride,
        "groups": module.fields["groups"],
        "padding": tuple(side_padding(side, size, stride, kind) for side in sides),
    }


def _bias(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"bias": np.float32(params["bias"])} if "bias" in params else {}


def _quantizer(module: Recorded, quant: Mapping[str, np.ndarray], bits: Bits) -> Quantizer | None:
    settings = module.fields["settings"]
    if bits.act == FULL_BITS:
        return None
    step = step_sizes(settings, quant["act_step"])[settings.act_bits.index(bits.act)]
    return Quantizer(bits.act, module.fields["signed"], float(step), module.fields["shift"])


def _fold(
    module: Recorded, params: Mapping[str, np.ndarray], statistics: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns batch norm with running statistics as x * scale + offset, float32 [channels]."""
    variance = np.float64(statistics["var"]) + module.fields["epsilon"]
    scale = np.float64(params["scale"]) / np.sqrt(variance)
    offset = np.float64(params["bias"]) - np.float64(statistics["mean"]) * scale
    return {"scale": np.float32(scale), "offset": np.float32(offset)}
