"""The house: folders are the stages of the pipeline, and imports go down. What docs/architecture.md says of it is so."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

import se_fx

HOME = Path(se_fx.__file__).parent
#: Packages and modules at the top, lowest first: each may import what stands before it. "" is `se_fx` itself, the public names.
ORDER = [
    *("errors", "arguments", "names", "regions"),
    *("capture", "analysis", "placement", "insertion", "blocks", "cost", "criteria", "planning", "report", "rewrites"),
    *("optimize", "transform", "suggest", "measure", "sharing", ""),
    *("loading", "integrations", "cli", "__main__"),
]
SOURCES = {
    ".".join(path.relative_to(HOME).with_suffix("").parts).removesuffix("__init__").rstrip("."): path.read_text("utf-8")
    for path in HOME.rglob("*.py")
}
PACKAGES = [name for name in ORDER if (HOME / name).is_dir() and name]


def imports(source: str) -> Iterator[str]:
    """The modules of se_fx that code imports, anywhere: inside functions, and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "se_fx":
            module = node.module.removeprefix("se_fx").lstrip(".")
            inner = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
            yield from (name if name in SOURCES else module for name in inner)
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.partition(".")[0] == "se_fx")


def room(module: str) -> str:
    return module.partition(".")[0]


def faults(module: str, source: str) -> list[str]:
    """Imports that go up, or into another package's inner modules."""
    found = []
    for other in imports(source):
        if ORDER.index(room(other)) > ORDER.index(room(module)):
            found.append(f"{module} imports {other}, which stands above it")
        elif "." in other and room(other) != room(module):
            found.append(f"{module} imports {other}, which is an inner module of another package")
    return found


def test_the_order_has_everything() -> None:
    assert {room(module) for module in SOURCES} == set(ORDER)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_go_down(module: str) -> None:
    assert faults(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("capture.tracer", "from se_fx.planning import Plan"),
        ("cost", "import se_fx"),
        ("report.charts", "if TYPE_CHECKING:\n    from se_fx.transform import report"),
        ("blocks.squeeze_excite", "def late():\n    from se_fx.cost import measure"),
        ("planning.plan", "from se_fx.cost.counting import Cost"),
        ("errors", "import se_fx.arguments"),
    ],
)
def test_an_import_put_in_by_hand_is_found(module: str, line: str) -> None:
    assert len(faults(module, f"{SOURCES[module]}\n\n{line}\n")) == 1


def test_no_circles_within_packages_either() -> None:
    flow = networkx.DiGraph((module, other) for module, source in SOURCES.items() for other in imports(source) if other)
    assert flow.number_of_edges() > 150
    assert networkx.is_directed_acyclic_graph(flow), networkx.find_cycle(flow)


def test_what_ls_shows_is_short() -> None:
    def shown(folder: Path) -> list[str]:
        return [path.name for path in folder.iterdir() if path.name != "__pycache__"]

    assert len([name for name in shown(HOME) if "." in name]) <= 12
    for folder in {path.parent for path in HOME.rglob("*.py")} - {HOME}:
        assert len([name for name in shown(folder) if "." in name]) <= 11, folder.name
    for module, source in SOURCES.items():
        assert len(source.splitlines()) <= 350, module


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "integrations"])
def test_a_package_says_what_goes_in_and_out_and_exports_no_more_than_others_use(package: str) -> None:
    tree = ast.parse(SOURCES[package])
    text = " ".join((ast.get_docstring(tree) or "").split())
    assert re.search(r"\bin\b", text)
    assert re.search(r"\bout\b", text)
    assert re.search(r"[Kk]nows nothing", text)
    (exported,) = (
        ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and "__all__" in ast.dump(node)
    )
    places = [HOME, *(HOME.parent / name for name in ("tests", "examples", "docs"))]
    files = [
        path for place in places for path in (*place.rglob("*.py"), *place.rglob("*.md")) if HOME / package not in path.parents
    ]
    used = "\n".join(path.read_text("utf-8") for path in files)
    assert [name for name in exported if not re.search(rf"\b{name}\b", used)] == []


def test_the_page_has_every_room() -> None:
    page = (HOME.parent / "docs/architecture.md").read_text("utf-8")
    first_cells = re.findall(r"^\| ([^|]*`[^|]*) \|", page, re.MULTILINE)
    listed = {name for cell in first_cells for name in re.findall(r"`(\w+)(?:\.py|/)`", cell)}
    assert listed == {name for name in ORDER if not name.startswith("__")} - {""}


def test_integrations_know_public_names_only() -> None:
    for module, source in SOURCES.items():
        if module.startswith("integrations."):
            assert set(imports(source)) <= {""}, module


def test_blocks_know_nothing_of_graphs_nor_cost_of_tables() -> None:
    never = (("blocks", "torch.fx"), ("cost", "tabulate"), ("report", "torch"), ("measure.timings", "torch"))
    for part, other in never:
        for module in (name for name in SOURCES if name == part or name.startswith(f"{part}.")):
            tree = ast.parse(SOURCES[module])
            names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            assert other not in names, module
