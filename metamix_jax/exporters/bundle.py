"""The integer bundle. Three files; nothing in them is executed or unpickled:

    graph.json    nodes, policy, activation step sizes, digests of all three files
    weights.bin   MAGIC, then the levels of every layer at its true bit-width (packing.py), in graph
                  order, each layer starting at a byte boundary, laid out as in graph.Kernel;
                  what runs again is stored once
    scales.bin    little-endian float32: weight step sizes, biases, batch norm scales and offsets

Reading needs only NumPy and validates everything it reads.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from metamix_jax.errors import UserError
from metamix_jax.exporters.graph import IMAGE, OPS, Graph, Kernel, Node, Quantizer, result_shape
from metamix_jax.exporters.packing import pack, packed_size, unpack

FORMAT = "metamix_jax integer bundle"
VERSION = 1
MAGIC = b"MMXBITS1"  # the header of weights.bin
GRAPH, WEIGHTS, SCALES = FILES = ("graph.json", "weights.bin", "scales.bin")


def encode(graph: Graph) -> dict[str, bytes]:
    """Returns file name -> content of the bundle."""
    weights, scales = _Content(MAGIC), _Content()
    nodes = []
    for node in graph.nodes:
        row = {"op": node.op, "name": node.name, "inputs": node.inputs, "shape": node.shape}
        if node.options:
            row["options"] = dict(node.options)
        if node.arrays:
            row["arrays"] = {name: _place(scales, array) for name, array in node.arrays.items()}
        if node.quantizer is not None:
            row["quantizer"] = node.quantizer._asdict()
        if node.other is not None:
            row["other"] = node.other._asdict()
        if node.kernel is not None:
            kernel = node.kernel
            row["kernel"] = {
                "bits": kernel.bits,
                "shape": kernel.levels.shape,
                "offset": weights.add(pack(kernel.levels, kernel.bits)),  # in bytes
                "step": _place(scales, kernel.step),
            }
        nodes.append(row)
    binary = {WEIGHTS: bytes(weights.content), SCALES: bytes(scales.content)}
    facts = {field.name: getattr(graph, field.name) for field in dataclasses.fields(graph)}
    content = {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "nodes": nodes,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in binary.items()
        },
    }
    text = json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n"
    return {GRAPH: text.encode(), **binary}


def read_bundle(directory: Path) -> Graph:
    """Reads a bundle.

    Raises:
      UserError: a file is missing, damaged or not part of a bundle.
    """
    directory = Path(directory).expanduser()
    contents = {}
    for name in FILES:
        try:
            contents[name] = (directory / name).read_bytes()
        except OSError as error:
            raise UserError(
                f"{directory / name}: cannot be read ({error.strerror}); expected a bundle written "
                f"by --mode=export, with {', '.join(FILES)}"
            ) from error
    return decode(contents, str(directory))


def decode(contents: dict[str, bytes], source: str) -> Graph:
    """Returns the graph of a bundle's files; raises UserError as `read_bundle` does."""
    try:
        content = json.loads(contents[GRAPH])
    except (ValueError, RecursionError) as error:
        raise _damaged(source, GRAPH, f"not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _damaged(source, GRAPH, f"expected format {FORMAT!r}")
    if content.get("version") != VERSION:
        found = content.get("version")
        raise UserError(f"{source}/{GRAPH}: version {found!r}; expected {VERSION}; export it again")
    if content.pop("sha256", None) != _digest(content):
        raise _damaged(source, GRAPH, "its sha256 does not match its content")
    try:
        for name in (WEIGHTS, SCALES):
            facts, data = content["files"][name], contents[name]
            if len(data) != facts["bytes"]:
                raise _damaged(source, name, f"{len(data)} bytes, expected {facts['bytes']}")
            if hashlib.sha256(data).hexdigest() != facts["sha256"]:
                raise _damaged(source, name, f"its sha256 does not match {GRAPH}")
        if not contents[WEIGHTS].startswith(MAGIC):
            raise _damaged(source, WEIGHTS, f"does not start with {MAGIC.decode()}")
        return _graph(content, contents)
    except UserError:
        raise
    # Digests can match and the content still be invalid, if another program wrote the file.
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(source, GRAPH, f"{type(error).__name__}: {error}") from error


def _graph(content: dict[str, Any], contents: dict[str, bytes]) -> Graph:
    nodes, shapes = [], {IMAGE: _tuples(content["image_shape"])}
    for row in content["nodes"]:
        node = _node(row, contents)
        wanted = OPS[node.op]
        fits = len(node.inputs) == wanted if wanted is not None else len(node.inputs) >= 1
        if not fits or node.name in shapes:
            raise ValueError(
                f"node {node.name!r}: duplicate name or wrong number of inputs ({len(node.inputs)})"
            )
        shapes[node.name] = result_shape(node, [shapes[name] for name in node.inputs])
        if node.shape != shapes[node.name]:
            raise ValueError(f"node {node.name!r} has shape {shapes[node.name]}, not {node.shape}")
        nodes.append(node)
    if nodes[-1].shape != (content["num_classes"],):
        raise ValueError(f"the last node, {nodes[-1].name!r}, does not output class scores")
    for name in ("mean", "std"):
        values = np.float32(content[name])
        if values.shape not in ((1,), shapes[IMAGE][-1:]) or not np.isfinite(values).all():
            raise ValueError(f"{name}: expected one finite number, or one per channel")
    facts = {
        field.name: _tuples(content[field.name])
        for field in dataclasses.fields(Graph)
        if field.name not in ("nodes", "policy")
    }
    return Graph(nodes=tuple(nodes), policy=content["policy"], **facts)


def _node(row: dict[str, Any], contents: dict[str, bytes]) -> Node:
    quantizer, other = (_quantizer(row, key) for key in ("quantizer", "other"))
    kernel = None
    if "kernel" in row:
        facts = row["kernel"]
        bits, shape, start = facts["bits"], _tuples(facts["shape"]), facts["offset"]
        if bits not in range(2, 9) or min(shape) < 1:
            raise ValueError(f"{row['name']}: invalid kernel, shape {shape} at {bits} bits")
        stop = start + packed_size(math.prod(shape), bits)
        levels = unpack(contents[WEIGHTS][start:stop], bits, shape)
        kernel = Kernel(bits, levels, _floats(facts["step"], contents))
    if (kernel is not None) != (row["op"] in ("conv", "dense")):
        raise ValueError(f"{row['name']}: conv and dense need a kernel, other ops have none")
    if (other is not None) != (row["op"] == "product") or (other and not quantizer):
        raise ValueError(f"{row['name']}: products need two quantizers, other ops have none")
    arrays = {name: _floats(place, contents) for name, place in row.get("arrays", {}).items()}
    return Node(
        op=row["op"],
        name=row["name"],
        inputs=_tuples(row["inputs"]),
        shape=_tuples(row["shape"]),
        options={name: _tuples(value) for name, value in row.get("options", {}).items()},
        arrays=arrays,
        quantizer=quantizer,
        kernel=kernel,
        other=other,
    )


def _quantizer(row: dict[str, Any], key: str) -> Quantizer | None:
    if key not in row:
        return None
    quantizer = Quantizer(**row[key])
    numbers = quantizer.bits in range(2, 9) and quantizer.signed in (False, True)
    if not (numbers and 0 < quantizer.step < np.inf and abs(quantizer.shift) < np.inf):
        raise ValueError(f"{row['name']}: invalid quantizer {quantizer}")
    return quantizer


class _Content:
    """The content of a binary file so far."""

    def __init__(self, header: bytes = b""):
        self.content, self._places = bytearray(header), {}

    def add(self, part: bytes) -> int:
        """Appends a part, unless it is there already; returns its offset in bytes."""
        place = self._places.setdefault(part, len(self.content))
        if place == len(self.content):
            self.content += part
        return place


def _place(scales: _Content, array: np.ndarray) -> dict[str, int]:
    """Appends an array; returns its offset in bytes and its number of float32."""
    return {"offset": scales.add(array.astype("<f4").tobytes()), "count": array.size}


def _floats(place: dict[str, int], contents: dict[str, bytes]) -> np.ndarray:
    stop = place["offset"] + 4 * place["count"]
    found = np.frombuffer(contents[SCALES][place["offset"] : stop], "<f4")
    if found.size != place["count"] or not np.isfinite(found).all():
        raise ValueError(
            f"{SCALES}: expected {place['count']} finite numbers at byte {place['offset']}"
        )
    return found.astype(np.float32)


def _digest(content: dict[str, Any]) -> str:
    # Of a canonical form, independent of indentation.
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def _damaged(source: str, name: str, what: str) -> UserError:
    return UserError(f"{source}/{name}: damaged or not part of a bundle ({what}); export it again")
