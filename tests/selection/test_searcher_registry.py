"""A searcher is one file: the registry is complete, and nothing else lists searchers."""

import ast

import pytest

from metamix_jax.commands import compare
from metamix_jax.config import default
from metamix_jax.selection import searchers
from metamix_jax.selection.searcher import Searcher
from metamix_jax.selection.searchers import SEARCHERS
from tests.helpers.config_fields import ROOT, value_of

PACKAGE = ROOT / "metamix_jax"
FOLDER = PACKAGE / "selection/searchers"


def test_every_file_is_a_searcher_of_its_name():
    assert list(SEARCHERS) == sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
    for name, searcher in SEARCHERS.items():
        assert isinstance(searcher, Searcher) and searcher.name == name
        assert searcher.summary and "\n" not in searcher.summary
        assert all(row(default()).name == row.__name__ for row in searcher.phases)
        assert callable(searcher.choose) == bool(searcher.phases) == (name != "none")


def test_what_trains_a_searcher_comes_before_the_bits_are_chosen():
    assert {s.name for s in SEARCHERS.values() if s.trains} == {
        "metamix", "metamix_plus", "joint", "asga",
    }  # fmt: skip
    for searcher in SEARCHERS.values():
        needing = [row(default()).needs_policy for row in searcher.phases]
        assert needing == sorted(needing)


def test_fields_of_searchers_are_in_the_configuration():
    config, paths = default(), []
    for searcher in SEARCHERS.values():
        for field in searcher.fields:
            assert value_of(config, field.path) == field.default
            assert field.check is None or field.check.holds(field.default)
            assert field.meaning
            paths.append(field.path)
        for path in searcher.exclusive:
            assert not value_of(config, path)
    assert len(paths) == len(set(paths))
    assert {path for path in paths if path.startswith(("asga.", "ompq."))} == {
        f"{section}.{name}" for section in ("asga", "ompq") for name in config[section]
    }


@pytest.mark.parametrize(("value", "holds"), [(0, True), (1e300, True), (-1e-9, False)])
def test_what_a_number_may_be(value, holds):
    check = SEARCHERS["ompq"].fields[0].check
    assert check.holds(value) == holds
    for broken in (float("nan"), float("inf"), 10**400):
        assert not check.holds(broken)


def test_methods_of_a_comparison():
    assert compare.METHODS["joint"] == {"search.searcher": "joint"}
    unfixed = {"search.searcher": "metamix", "bit_search.fixed_meta_state": False}
    assert compare.METHODS["metamix_unfixed"] == unfixed
    searched = {name for name, searcher in SEARCHERS.items() if searcher.compared}
    assert searched == set(SEARCHERS) - {"file", "none"}
    assert {name for name in compare.METHODS if name in SEARCHERS} == searched
    assert set(default().compare.methods) <= set(compare.METHODS)


def test_the_documentation_has_the_table():
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(searchers.table() in path.read_text() for path in texts), searchers.table()


def test_no_other_module_lists_searchers():
    # The default of compare.methods is a choice, not a list of all searchers.
    others = [
        path
        for path in PACKAGE.rglob("*.py")
        if FOLDER not in path.parents and path != PACKAGE / "defaults.py"
    ]
    for path in others:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
                texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert len(texts & set(SEARCHERS)) < 2, f"{path}:{node.lineno}"
            if isinstance(node, ast.Compare):
                asked = [n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)]
                constants = [n for n in ast.walk(node) if isinstance(n, ast.Constant)]
                assert "searcher" not in asked or not constants, f"{path}:{node.lineno}"
