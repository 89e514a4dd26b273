"""The order of imports, checked in the source."""

import ast
import graphlib
import importlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "metamix_jax"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

# A room imports only from earlier ones, and without a circle within itself.
ROOMS = (
    "errors", "fields", "runtime", "workdir", "data", "networks", "selection", "defaults", "config",
    "recipes", "report", "training", "exporters", "commands", "api", "command_line", "__main__",
)  # fmt: skip
RANK = {name: rank for rank, name in enumerate(ROOMS)}
MOST_FOLDERS = 9
HEAVY = {"tensorflow", "torch", "torchvision", "tensorboard"}
LONGEST_FILE = 300  # lines


def parse(path):
    return ast.parse(path.read_text(), str(path))


def imports(tree):
    """Yields the full dotted names imported in a tree, including imports in functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_on_import(tree):
    """Returns a tree without function bodies: the code executed when importing the module."""

    class DropFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node):  # noqa: N802  ast's name
            return None

        visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    return DropFunctions().visit(tree)


def part(module):
    """Returns a dotted module's name in ORDER: metamix_jax.networks.zoo.resnet -> networks."""
    return module.removeprefix(f"{PACKAGE}.").split(".")[0]


def own_modules(tree):
    """Returns the modules of the package that a tree imports."""
    found = set()
    for name in imports(tree):
        if name.split(".")[0] == PACKAGE:
            is_module = name in FILES
            found.add(name if is_module else name.rsplit(".", 1)[0])
    return found


@pytest.mark.parametrize("module", [name for name in FILES if name != PACKAGE])
def test_imports_run_one_way(module):
    here = part(module)
    assert here in RANK, f"{here} is not a room; see ROOMS"
    for imported in own_modules(parse(FILES[module])):
        there = part(imported)
        if there != here:
            assert RANK[there] < RANK[here], f"{module} imports {imported}"


def test_there_are_no_circles():
    arrows = {module: own_modules(parse(path)) - {module} for module, path in FILES.items()}
    order = graphlib.TopologicalSorter(arrows)
    order.prepare()  # raises CycleError, which names the circle


def test_the_package_has_few_rooms():
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(ROOMS) and len(folders) <= MOST_FOLDERS


def test_the_package_itself_imports_nothing_until_it_is_used():
    roots = {name.split(".")[0] for name in imports(run_on_import(parse(FILES[PACKAGE])))}
    assert roots <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", ["graph", "packing", "bundle", "executor"])
def test_exported_integers_run_on_numpy_alone(module):
    found = {name.split(".")[0] for name in imports(parse(FILES[f"{PACKAGE}.exporters.{module}"]))}
    assert found <= {"numpy", PACKAGE, *sys.stdlib_module_names}


@pytest.mark.parametrize("path", [*FILES.values(), *CONFIGS], ids=lambda path: path.stem)
def test_nothing_heavy_is_imported_with_a_module(path):
    roots = {name.split(".")[0] for name in imports(run_on_import(parse(path)))}
    assert not roots & HEAVY


def test_torch_is_imported_for_weight_files_alone():
    needing_it = {
        module
        for module, path in FILES.items()
        if {name.split(".")[0] for name in imports(parse(path))} & HEAVY
    }
    assert needing_it <= {f"{PACKAGE}.networks.torch_weights"}


def test_configurations_import_the_defaults_alone():
    for path in CONFIGS:
        assert own_modules(parse(path)) <= {f"{PACKAGE}.config", f"{PACKAGE}.recipes"}


def test_quantizers_need_jax_alone():
    tree = parse(FILES[f"{PACKAGE}.networks.quantizers"])
    assert {name.split(".")[0] for name in imports(tree)} <= {"jax", "typing", "collections"}


def test_no_drawer_for_everything():
    names = {name for module in FILES for name in module.split(".")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("module", FILES)
def test_files_stay_short(module):
    assert len(FILES[module].read_text().splitlines()) < LONGEST_FILE


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_benchmarks_import_what_is_there(path):
    # Benchmarks import inside functions, and the tests do not run them.
    for name in imports(parse(path)):
        if name.split(".")[0] == PACKAGE and name not in FILES:
            module, _, member = name.rpartition(".")
            assert hasattr(importlib.import_module(module), member), f"{name} does not exist"
