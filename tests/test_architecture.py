"""What docs/architecture.md says of the modules is so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import networkx

import se_fx

HOME = Path(se_fx.__file__).parent
MODULES = {path.relative_to(HOME).with_suffix("").as_posix().replace("/", "."): path for path in HOME.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The modules of se_fx that a module imports as it is loaded; for those that a type checker alone reads, see there."""
    found: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "se_fx":
            found |= {node.module.partition(".")[2]} if "." in node.module else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.partition(".")[0] == "se_fx"}
    return found


def test_every_module_is_in_the_table() -> None:
    page = (HOME.parent / "docs/architecture.md").read_text("utf-8")
    first_cells = re.findall(r"^\| ([^|]*`[^|]*) \|", page, re.MULTILINE)
    listed = {name for cell in first_cells for name in re.findall(r"`(\w+)\.py`", cell)}
    assert listed == {name for name in MODULES if "." not in name and not name.startswith("__")}


def test_no_module_reaches_back() -> None:
    flow = networkx.DiGraph((module, other) for module, path in MODULES.items() for other in imports(path) if other in MODULES)
    assert flow.number_of_edges() > 100
    assert networkx.is_directed_acyclic_graph(flow), networkx.find_cycle(flow)


def test_integrations_know_public_names_only() -> None:
    for name, path in MODULES.items():
        if name.startswith("integrations."):
            assert imports(path) <= {""}, name


def test_blocks_know_nothing_of_graphs_nor_cost_of_tables() -> None:
    for module, never in (("blocks", "torch.fx"), ("cost", "tabulate"), ("report", "torch"), ("timings", "torch")):
        tree = ast.parse(MODULES[module].read_text("utf-8"))
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert never not in names, module
