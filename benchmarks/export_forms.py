"""The exported forms of a network, compared with JAX: levels of every quantizer, and scores."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from metamix_jax.exporters import executor, quantized_network
from metamix_jax.exporters.graph import Graph, Node, Quantizer
from metamix_jax.networks.quantizers import fake_quant

BATCH = 10
FORCED = " from JAX's levels"  # suffix of forms in which each layer starts from those
TIE = 1e-3  # in steps: greatest distance of a differing level's value from a rounding boundary


class Levels:
    """A hook for running a form: compares the levels of every layer's input with JAX's.

    An image diverges from JAX's at the first layer with a different level; later ones follow.

    forced: the form continues with JAX's levels, so that every layer starts from the same input.
    """

    def __init__(self, *, forced: bool = False):
        self.forced, self.inputs, self.expected = forced, {}, {}
        self.parted = np.zeros(0, bool)
        self.compared = self.ties = self.errors = self.following = 0
        self.furthest = 0.0  # greatest distance of a tie from the boundary, in steps

    def start(
        self, inputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], count: int
    ) -> None:
        """Starts `count` images; layer path -> values quantized by JAX, and their int32 levels."""
        self.inputs, self.expected = inputs, expected
        self.parted = np.append(self.parted, np.zeros(count, bool))

    def __call__(self, node: Node, levels: np.ndarray) -> np.ndarray:
        """Compares int levels [n, ...] of one layer; returns those to continue with."""
        x, expected = (values[node.name][: len(levels)] for values in (self.inputs, self.expected))
        differs, parted = levels != expected, self.parted[-len(levels) :]
        image, *place = np.nonzero(differs)
        places = (np.float64(x[differs]) + node.quantizer.shift) / node.quantizer.step
        distance = np.abs(places - np.floor(places) - 0.5)
        tie = (np.abs(levels - expected)[differs] == 1) & (distance < TIE)
        first = ~parted[image]
        self.compared += levels.size
        self.ties += int(np.sum(first & tie))
        self.errors += int(np.sum(first & ~tie))
        self.following += int(np.sum(~first))
        self.furthest = max([self.furthest, *distance[first & tie]])
        if self.forced:
            return expected
        parted[image] = True  # a view of self.parted
        return levels


Form = Callable[[np.ndarray, Levels], np.ndarray]  # images [n, h, w, c], hook -> scores


class Outcome(NamedTuple):
    """scores: of a form, [n, classes]; seconds: total, including the comparison of levels."""

    levels: Levels
    scores: np.ndarray
    seconds: float


def jax_levels(x: np.ndarray, quantizer: Quantizer) -> np.ndarray:
    """Returns the int32 levels to which JAX quantizes real values."""
    bits, signed, step, shift = quantizer
    fake = np.array(fake_quant(x, np.float32(step), bits, signed=signed, shift=shift))
    fake += np.float32(shift)
    fake /= np.float32(step)
    return np.rint(fake, out=fake).astype(np.int32)


def compare(
    network: quantized_network.QuantizedNetwork,
    graph: Graph,
    images: np.ndarray,
    forms: Mapping[str, tuple[Form, int]],
) -> tuple[np.ndarray, dict[str, Outcome]]:
    """Returns JAX's scores of normalized images, and the outcome of each form on its first images.

    JAX runs operation by operation. Compiled as a whole, it may compute the values that it
    quantizes and those that it outputs in two ways, with different rounding.
    """
    reference, scores = [], {name: [] for name in forms}
    levels = {name: Levels(forced=name.endswith(FORCED)) for name in forms}
    seconds = dict.fromkeys(forms, 0.0)
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        found, collections = network.network.model.apply(
            network.variables, jnp.asarray(batch), train=False, precision=network.precision,
            mutable=["intermediates"],
        )  # fmt: skip
        sown = flatten_dict(collections["intermediates"], sep="/")
        inputs = {
            path.removesuffix("/quantizer_input"): np.asarray(values[0])
            for path, values in sown.items()
        }
        expected = {
            node.name: jax_levels(inputs[node.name], node.quantizer)
            for node in graph.layers if node.quantizer
        }  # fmt: skip
        reference.append(np.asarray(found))
        for name, (form, limit) in forms.items():
            number = min(len(batch), limit - start)
            if number <= 0:
                continue
            levels[name].start(inputs, expected, number)
            began = time.perf_counter()
            scores[name].append(form(batch[:number], levels[name]))
            seconds[name] += time.perf_counter() - began
    outcomes = {
        name: Outcome(levels[name], np.concatenate(scores[name]), seconds[name]) for name in forms
    }
    return np.concatenate(reference), outcomes


# The forms -------------------------------------------------------------------------------------


def numpy_form(graph: Graph) -> Form:
    """Returns the form that runs the bundle in the reference executor."""
    return lambda images, hook: executor.run(graph, images, hook)


def onnxruntime_form(model: bytes, graph: Graph) -> Form:
    """QCDQ in onnxruntime at its default level; the levels come from a copy that outputs them."""
    import onnx

    plain, shown = _session(model), onnx.load_model_from_string(model)
    names = _level_tensors(shown, graph)
    shown.graph.output.extend(_known(shown)[name] for name in names.values())
    with_levels = _session(shown.SerializeToString())

    def run(images: np.ndarray, hook: Levels) -> np.ndarray:
        inputs = {"image": _channels_first(images)}
        found = with_levels.run(list(names.values()), inputs)
        for name, levels in zip(names, found, strict=True):
            hook(_layer(graph, name), _channels_last(levels).astype(np.int32))
        return plain.run(None, inputs)[0]

    return run


def onnxruntime_form_by_layer(model: bytes, graph: Graph) -> Form:
    """QCDQ in onnxruntime, with JAX's levels as the input of every layer."""
    import onnx

    shown = onnx.load_model_from_string(model)
    names = _level_tensors(shown, graph)
    types = {name: _known(shown)[tensor].type for name, tensor in names.items()}
    outputs = _cut(shown, names.values())
    session = _session(shown.SerializeToString())

    def run(images: np.ndarray, hook: Levels) -> np.ndarray:
        inputs = {"image": _channels_first(images)}
        for name, tensor in names.items():
            dtype = onnx.helper.tensor_dtype_to_np_dtype(types[name].tensor_type.elem_type)
            levels = hook.expected[name][: len(images)]
            inputs[tensor] = _channels_first(levels).astype(dtype)
        scores, *found = session.run(["scores", *outputs], inputs)
        for name, levels in zip(names, found, strict=True):
            hook(_layer(graph, name), _channels_last(levels).astype(np.int32))
        return scores

    return run


def qonnx_form(model: bytes, graph: Graph, *, by_layer: bool = False) -> Form:
    """QONNX in qonnx's executor, image by image; `by_layer`: JAX's levels as the layers' inputs."""
    import onnx
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    loaded = onnx.load_model_from_string(model)
    quantized = [node for node in graph.layers if node.quantizer]
    names = [f"{node.name}/input" for node in quantized]
    own = _cut(loaded, names) if by_layer else names
    wrapper = ModelWrapper(loaded)

    def run(images: np.ndarray, hook: Levels) -> np.ndarray:
        tensors = []
        for i in range(len(images)):
            inputs = {"image": _channels_first(images[i : i + 1])}
            if by_layer:
                for node, name in zip(quantized, names, strict=True):
                    levels = np.float32(hook.expected[node.name][i : i + 1])
                    inputs[name] = _channels_first(levels * np.float32(node.quantizer.step))
            tensors.append(execute_onnx(wrapper, inputs, return_full_exec_context=True))
        for node, name in zip(quantized, own, strict=True):
            real = np.concatenate([each[name] for each in tensors])
            levels = np.rint(_channels_last(real) / np.float32(node.quantizer.step))
            hook(node, levels.astype(np.int32))
        return np.concatenate([each["scores"] for each in tensors])

    return run


def stablehlo_form(content: bytes) -> Form:
    """StableHLO, compiled; it does not output levels."""
    call = jax.jit(jax.export.deserialize(bytearray(content)).call)
    return lambda images, hook: np.asarray(call(images))


def _session(content: bytes) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def _level_tensors(model: Any, graph: Graph) -> dict[str, str]:
    """Returns layer -> the tensor in a QCDQ file with its input's levels."""
    made = {name for node in model.graph.node for name in node.output}
    return {
        node.name: next(
            name for last in ("clipped", "levels")
            if (name := f"{node.name}/input/{last}") in made
        )
        for node in graph.layers if node.quantizer
    }  # fmt: skip


def _known(model: Any) -> dict[str, Any]:
    return {info.name: info for info in model.graph.value_info}


def _cut(model: Any, names: Iterable[str]) -> list[str]:
    """Turns tensors of an ONNX model into inputs; returns the outputs with their former values."""
    known, names = _known(model), list(names)
    for node in model.graph.node:
        node.output[:] = [f"{name}/own" if name in names else name for name in node.output]
    for name in names:
        model.graph.input.append(known[name])
        model.graph.output.append(known[name])
        model.graph.output[-1].name = f"{name}/own"
        model.graph.value_info.remove(known[name])
    return [f"{name}/own" for name in names]


def _layer(graph: Graph, name: str) -> Node:
    return next(node for node in graph.layers if node.name == name)


def _channels_last(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def _channels_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x
