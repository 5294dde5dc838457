"""A folder imports only folders above it, and no module leads back to itself."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "sparsemem"
# DESIGN.md, section 4; the modules of the first line know only modules named before them
ROOT = ("choices", "provenance", "precision", "processes", "atomic", "artifacts")
FOLDERS = (
    "layer", "adapter", "background", "optim", "patches", "data", "training", "stream", "evaluation", "saved",
    "study", "serving",
)  # fmt: skip
# these may know all
FREE = ("cli", "compare", "__init__", "__main__")


def modules():
    """Every module by its dotted name below the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()


def imports(name):
    """(module, line, for types alone) of everything of ours that a module imports, in functions too."""
    path = MODULES[name]
    package = list(path.relative_to(PACKAGE).parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [
                alias.name.split(".")[1:] for alias in node.names if alias.name.startswith("sparsemem.")
            ]
        elif isinstance(node, ast.ImportFrom) and (
            node.level or (node.module or "").split(".")[0] == "sparsemem"
        ):
            base = package[: len(package) - node.level + 1] if node.level else []
            named = (node.module or "").split(".") if node.module else []
            base = [*base, *(named if node.level else named[1:])]
            # `from ..folder import module` or `from ..folder.module import name`
            targets = [
                [*base, alias.name] if ".".join([*base, alias.name]) in MODULES else base
                for alias in node.names
            ]
        else:
            continue
        # one import of several names is one line
        for target in map(list, dict.fromkeys(map(tuple, targets))):
            # a name of the package itself, such as `from .. import calibrate`, is loaded on use
            known = ".".join(target) or "__init__"
            assert known in MODULES, f"{name}, line {node.lineno}: {known} is no module"
            yield known, node.lineno, node in for_types


def room(name):
    return name.split(".")[0]


def test_every_folder_has_its_place():
    assert {room(name) for name in MODULES} <= {*ROOT, *FOLDERS, *FREE}


@pytest.mark.parametrize("folder", [*ROOT, *FOLDERS])
def test_a_folder_imports_only_folders_above_it(folder):
    allowed = (
        {*ROOT[: ROOT.index(folder)]}
        if folder in ROOT
        else {folder, *ROOT, *FOLDERS[: FOLDERS.index(folder)]}
    )
    wrong = [
        f"{name}, line {line}: {target}"
        for name in MODULES
        if room(name) == folder
        for target, line, _ in imports(name)
        if room(target) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_leads_back_to_itself():
    edges = {name: {target for target, _, for_types in imports(name) if not for_types} for name in MODULES}
    # the package's own names load on use
    del edges["__init__"]
    circles = []
    # depth first: a module that is still open when it is met again lies on a circle
    done = set()

    def visit(name, trail):
        if name in trail:
            circles.append(" -> ".join([*trail[trail.index(name) :], name]))
            return
        if name in done or name not in edges:
            return
        for target in sorted(edges[name]):
            visit(target, [*trail, name])
        done.add(name)

    for name in sorted(edges):
        visit(name, [])
    assert not circles, "\n".join(circles)
