"""Every field of the configuration is read by the program, checked in its source."""

import ast

import pytest
from ml_collections import ConfigDict

from metamix_jax import config as config_lib
from tests.helpers.config_fields import ROOT, change, leaves


class Reads(ast.NodeVisitor):
    """Collects the configuration fields that a module reads, as dotted paths.

    A name or attribute called `config` (or `_config`) is the configuration, one called
    `config_<section>` the sections of that name. Variables that hold sections are followed within
    their function. A computed key, `config[section].epochs`, becomes `*.epochs`.
    """

    def __init__(self, sections):
        self.found, self._sections, self._scopes = set(), sections, [{}]

    def visit_FunctionDef(self, node):  # noqa: N802  ast's name
        self._scopes.append({})
        self.generic_visit(node)
        self._scopes.pop()

    def visit_Assign(self, node):  # noqa: N802  ast's name
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=True)
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    self._scopes[-1][name.id] = self._paths(value)

    def visit_Attribute(self, node):  # noqa: N802  ast's name
        self._read(node)

    def visit_Subscript(self, node):  # noqa: N802  ast's name
        self._read(node)

    def visit_Call(self, node):  # noqa: N802  ast's name
        self._read(node)

    def _read(self, node):
        if not isinstance(getattr(node, "ctx", None), ast.Store):
            self.found |= self._paths(node)
        self.generic_visit(node)

    def _paths(self, node):
        """Returns the paths that an expression may refer to; none if it is not a configuration."""
        match node:
            case ast.Name(id=name):
                for scope in reversed(self._scopes):
                    if scope.get(name):
                        return scope[name]
                return self._named(name)
            case ast.Call(func=ast.Attribute(value=value, attr="get"), args=[key, *_]):
                return self._join(value, key)
            case ast.Subscript(value=value, slice=key):
                return self._join(value, key)
            case ast.Attribute(value=value, attr=attr):
                return self._named(attr) or self._join(value, ast.Constant(attr))
        return set()

    def _named(self, name):
        name = name.removeprefix("_")
        if name == "config":
            return {""}
        section = name.removeprefix("config_")
        if section == name:
            return set()
        return {path for path in self._sections if path.split(".")[-1] == section}

    def _join(self, value, key):
        constant = isinstance(key, ast.Constant) and isinstance(key.value, str)
        segment = key.value if constant else "*"
        return {f"{path}.{segment}".lstrip(".") for path in self._paths(value)}


def sections_of(config, prefix=""):
    found = []
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            found += [prefix + key, *sections_of(value, f"{prefix}{key}.")]
    return found


def unread(config, sources):
    """Returns the fields of `config` that none of the sources reads.

    A computed key counts for all fields whose name is a string in one of the sources.
    """
    patterns, words = set(), set()
    for source in sources:
        tree = ast.parse(source)
        reads = Reads(sections_of(config))
        reads.visit(tree)
        patterns |= reads.found
        words |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}

    def is_read(path):
        keys = path.split(".")
        return any(
            len(parts := pattern.split(".")) == len(keys)
            and all(
                p == key or (p == "*" and key in words) for p, key in zip(parts, keys, strict=True)
            )
            for pattern in patterns
        )

    return [path for path in leaves(config) if not is_read(path)]


def product_sources():
    """Returns all sources except those that only list and check the fields."""
    package = ROOT / "metamix_jax"
    lists = {package / f"{name}.py" for name in ("fields", "defaults", "config")}
    return [path.read_text() for path in package.rglob("*.py") if path not in lists]


def test_every_key_is_read():
    assert unread(config_lib.default(), product_sources()) == []


@pytest.mark.parametrize("path", ["unread", "quant.unread", "data.unread", "bit_search.unread"])
def test_an_unread_key_is_found(path):
    config = config_lib.default().unlock()
    change(config, path, 1)
    assert unread(config, product_sources()) == [path]


def test_what_counts_as_read():
    config = ConfigDict(
        {"a": 1, "s": {"b": 1, "c": 1, "d": 1, "e": 1, "f": 1}, "t": {"b": 1, "u": {"c": 1}}}
    )
    source = """
def run(self, config, config_u):
    config.a, part, config.t.b = self.config.s["b"], config.s, 2
    for key in ("d", "never"):
        part.c + config_u.c + self._config.s[key]
    return part.get("e", 0), other.f
"""
    assert unread(config, [source]) == ["a", "s.f", "t.b"]
