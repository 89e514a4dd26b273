"""ONNX nodes for operations on every element, wherever the channels are."""

import math
from collections.abc import Callable

from metamix_jax.exporters.graph import Graph, Node
from metamix_jax.exporters.onnx_writers import Writer

Lowering = Callable[[Writer, Node, Graph], None]


def named(op: str, **attributes: int) -> Lowering:
    """Returns how to write an operation that is one in ONNX."""

    def lower(writer: Writer, node: Node, graph: Graph) -> None:
        writer.add(op, node.inputs, node.name, **attributes)

    return lower


def _clip_to_6(writer: Writer, x: str, output: str) -> str:
    return writer.add("Clip", [x, writer.constant("0", 0), writer.constant("6", 6)], output)


def _gate(writer: Writer, node: Node, output: str) -> str:
    # Not ONNX's HardSigmoid, which multiplies by 1/6 and so rounds differently.
    moved = writer.add("Add", [node.inputs[0], writer.constant("3", 3)], f"{node.name}/plus_3")
    clipped = _clip_to_6(writer, moved, f"{node.name}/clipped")
    return writer.add("Div", [clipped, writer.constant("6", 6)], output)


def _relu6(writer: Writer, node: Node, graph: Graph) -> None:
    _clip_to_6(writer, node.inputs[0], node.name)


def _hard_sigmoid(writer: Writer, node: Node, graph: Graph) -> None:
    _gate(writer, node, node.name)


def _hswish(writer: Writer, node: Node, graph: Graph) -> None:
    gate = _gate(writer, node, f"{node.name}/gate")
    writer.add("Mul", [node.inputs[0], gate], node.name)


def _rsqrt(writer: Writer, node: Node, graph: Graph) -> None:
    root = writer.add("Sqrt", node.inputs, f"{node.name}/root")
    writer.add("Reciprocal", root, node.name)


def _gelu(writer: Writer, node: Node, graph: Graph) -> None:
    """Adds the steps of GELU, which runtimes recognise; as one operation it needs opset 20."""
    (x,), name = node.inputs, node.name
    half, one = writer.constant("0.5", 0.5), writer.constant("1", 1)
    if node.options["approximate"]:
        square = writer.add("Mul", [x, x], f"{name}/square")
        cube = writer.add("Mul", [square, x], f"{name}/cube")
        share = writer.add("Mul", [cube, writer.constant("0.044715", 0.044715)], f"{name}/share")
        cubic = writer.add("Add", [x, share], f"{name}/cubic")
        factor = writer.constant("sqrt(2/pi)", math.sqrt(2 / math.pi))
        inside = writer.add("Mul", [cubic, factor], f"{name}/inside")
        curve = writer.add("Tanh", inside, f"{name}/tanh")
    else:
        inside = writer.add("Div", [x, writer.constant("sqrt(2)", math.sqrt(2))], f"{name}/inside")
        curve = writer.add("Erf", inside, f"{name}/erf")
    moved = writer.add("Add", [curve, one], f"{name}/plus_1")
    product = writer.add("Mul", [x, moved], f"{name}/product")
    writer.add("Mul", [product, half], name)


def _comparison(op: str) -> Lowering:
    def lower(writer: Writer, node: Node, graph: Graph) -> None:
        found = writer.add(op, node.inputs, f"{node.name}/bool")
        writer.add("Cast", found, node.name, to=1)  # float32

    return lower


def _where(writer: Writer, node: Node, graph: Graph) -> None:
    condition, *values = node.inputs
    true = writer.add("Greater", [condition, writer.constant("0", 0)], f"{node.name}/condition")
    writer.add("Where", [true, *values], node.name)


ELEMENTWISE: dict[str, Lowering] = {
    "relu": named("Relu"),
    "relu6": _relu6,
    "hswish": _hswish,
    "hsigmoid": _hard_sigmoid,
    "gelu": _gelu,
    "abs": named("Abs"),
    "erf": named("Erf"),
    "exp": named("Exp"),
    "floor": named("Floor"),
    "log": named("Log"),
    "negate": named("Neg"),
    "rsqrt": _rsqrt,
    "sigmoid": named("Sigmoid"),
    "sign": named("Sign"),
    "sqrt": named("Sqrt"),
    "tanh": named("Tanh"),
    "add": named("Add"),
    "subtract": named("Sub"),
    "multiply": named("Mul"),
    "divide": named("Div"),
    "maximum": named("Max"),
    "minimum": named("Min"),
    "greater": _comparison("Greater"),
    "greater_equal": _comparison("GreaterOrEqual"),
    "less": _comparison("Less"),
    "less_equal": _comparison("LessOrEqual"),
    "where": _where,
}
