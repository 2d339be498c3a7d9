"""The order of the house: imports run one way, from the settings to the command line, and never in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import relssl

SOURCE = Path(relssl.__file__).parent
# Each may import what stands in its own row or above.
ROWS = (
    {"errors", "files"},
    {"settings"},
    {"engine"},
    {"method", "data"},
    {"weights"},
    {"evaluation"},
    {"train"},
    {"report", "reproduction"},
    {"options"},
    {"cli"},
)


def imports(module: Path) -> Iterator[str]:
    """The dotted names, without `relssl.`, that a module imports, but for type checkers alone."""
    tree = ast.parse(module.read_text())
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in typing and (node.module or "").split(".")[0] == "relssl":
            base = (node.module or "").removeprefix("relssl").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".strip(".")
                inside = SOURCE / name.replace(".", "/")
                yield name if inside.with_suffix(".py").exists() or inside.is_dir() else base


GRAPH = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): set(imports(path)) - {""}
    for path in SOURCE.rglob("*.py")
    if path.parent != SOURCE or path.stem not in ("__init__", "__main__")
}


def row(module: str) -> int:
    folder = module.split(".")[0]
    rows = [number for number, names in enumerate(ROWS) if folder in names]
    assert rows, f"{folder} has no row yet: say where it stands"
    return rows[0]


def test_imports_run_one_way() -> None:
    wrong = [(module, other) for module, others in GRAPH.items() for other in others if row(other) > row(module)]
    assert not wrong


def test_there_is_no_circle() -> None:
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module not in finished:
            for other in GRAPH.get(module, ()):
                if other != module:
                    visit(other, (*path, module))
            finished.add(module)

    for module in GRAPH:
        visit(module, ())
