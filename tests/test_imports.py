"""The order of imports, held by reading the source."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "metamix_jax"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [ROOT / "main.py", *sorted((ROOT / PACKAGE).rglob("*.py"))]
}
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

# A module imports from rows above its own alone, and within its own subpackage. A new module is to
# be given its place here.
ORDER = (
    {"errors", "images", "calls", "depthwise", "materialise"},
    {
        "quantizers",
        "config",
        "convolution",
        "digests",
        "distributed",
        "interruption",
        "lock",
        "metrics",
        "precision",
        "pretrained",
        "process",
        "progress",
        "sharding",
        "splits",
        "validate",
    },
    {"bfloat16", "remote"},
    {"layers", "report", "datasets", "convert_tfrecord", "nonfinite", "failures"},
    {"models", "data"},
    {"cost"},
    {"budget"},
    {"policy", "phases"},
    {"searchers", "optimizer", "export"},
    {"state"},
    {"update"},
    {"train_step"},
    {"calibrate"},
    {"checkpoints"},
    {"experiment"},
    {"weights", "choose"},
    {"evaluate", "results", "diagnose"},
    {"run"},
    {"train"},
    {"compare", "library"},
    {"modes"},
    {"main"},
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
REPORTING = ("report", "export")  # written for finished runs; usable without what trains
HEAVY = {"tensorflow", "torch", "torchvision", "tensorboard"}
LONGEST_FILE = 300  # lines


def parse(path):
    return ast.parse(path.read_text(), str(path))


def imports(tree):
    """Yields the full dotted names that the nodes of a tree import, those in functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_on_import(tree):
    """Returns a tree without the bodies of functions: what importing the module executes."""

    class DropFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node):  # noqa: N802  ast's name
            return None

        visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    return DropFunctions().visit(tree)


def part(module):
    """Returns the name in ORDER of a dotted module: metamix_jax.models.resnet -> models."""
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
    assert here in RANK, f"give {here} its place in ORDER"
    for imported in own_modules(parse(FILES[module])):
        there = part(imported)
        if there != here:
            assert RANK[there] < RANK[here], f"{module} imports {imported}"


@pytest.mark.parametrize("module", FILES)
def test_no_cycles_within_a_subpackage(module):
    # `import x` inside a subpackage may name siblings, but none that names it back.
    for imported in own_modules(parse(FILES[module])):
        if imported != module and part(imported) == part(module):
            assert module not in own_modules(parse(FILES[imported]))


def test_the_package_itself_imports_nothing_until_it_is_used():
    assert list(imports(run_on_import(parse(FILES[PACKAGE])))) == []
    assert own_modules(parse(FILES[PACKAGE])) == {f"{PACKAGE}.calls"}


@pytest.mark.parametrize("module", ["graph", "packing", "bundle", "executor"])
def test_exported_integers_run_on_numpy_alone(module):
    found = {name.split(".")[0] for name in imports(parse(FILES[f"{PACKAGE}.export.{module}"]))}
    assert found <= {"numpy", PACKAGE, *sys.stdlib_module_names}


@pytest.mark.parametrize("subpackage", REPORTING)
def test_reporting_does_not_need_what_trains(subpackage):
    for module, path in FILES.items():
        if part(module) == subpackage:
            parts = {part(imported) for imported in own_modules(parse(path))}
            assert not parts & {"train_step", "experiment", "evaluate", "run", "train", "modes"}


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
    assert needing_it <= {f"{PACKAGE}.pretrained"}


def test_configurations_import_the_defaults_alone():
    for path in CONFIGS:
        assert own_modules(parse(path)) <= {f"{PACKAGE}.config"}


def test_quantizers_need_jax_alone():
    tree = parse(FILES[f"{PACKAGE}.quantizers"])
    assert {name.split(".")[0] for name in imports(tree)} <= {"jax", "typing", "collections"}


def test_no_drawer_for_everything():
    names = {name for module in FILES for name in module.split(".")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("module", FILES)
def test_files_stay_short(module):
    assert len(FILES[module].read_text().splitlines()) < LONGEST_FILE
