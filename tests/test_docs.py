"""The pages' code runs, prints what they say, and their links lead somewhere."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import se_fx
from se_fx import cli

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^(`{3,})([\w-]*)[^\n]*\n(.*?)^\1$", re.MULTILINE | re.DOTALL)

SHELL = ("bash", "sh", "shell")
ELSEWHERE = {  # commands of pages that aren't run here, by their beginnings: who runs them
    "python3 -m venv .venv": "CI",
    ".venv/bin/pre-commit install": "whoever contributes",
    ".venv/bin/pip install 'mutmut": "whoever tests the tests; it takes hours",
    "OMP_NUM_THREADS=1 .venv/bin/mutmut": "whoever tests the tests",
    ".venv/bin/mutmut": "whoever tests the tests",
    "pip install --no-deps mosaicml": "CI",
    "pip install torchmetrics": "CI",
    "python examples/composer_trainer.py": "CI, where Composer is installed",
    "python examples/export_onnx.py": "CI",
    "torchrun --nproc-per-node 2": "CI",
    "torchrun --nnodes 4": "nobody: it takes four machines",
}


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    return [(language, text) for _, language, text in BLOCK.findall(page.read_text("utf-8"))]


def with_blocks(*languages: str) -> list[Path]:
    return [page for page in PAGES if any(language in languages for language, _ in blocks_of(page))]


@pytest.mark.integration
@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("page", with_blocks("python"), ids=lambda page: page.name)
def test_python_blocks_run_in_their_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of `output` after one of `python` is what that prints. Compilers stop before C++, which takes minutes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    names: dict[str, object] = {}
    printed = ""
    for language, text in blocks_of(page):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(text, page.name, "exec"), names)
            printed = stream.getvalue()
        elif language == "output":
            check_output(text, printed)


# -------------------------------------------------------------------------------------------------------------- commands
def commands_of(page: Path) -> list[tuple[str, str | None]]:
    """The commands of a page, each with the output that the page shows; None in blocks of commands alone."""
    found: list[tuple[str, str | None]] = []
    for language, text in blocks_of(page):
        if language in SHELL:
            lines = text.replace("\\\n", "").splitlines()
            found += [(line, None) for line in lines if line and not line.startswith("#")]
        elif language == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                found.append((command, output))
    return found


def elsewhere(command: str) -> str | None:
    return next((start for start in ELSEWHERE if command.startswith(start)), None)


@pytest.mark.integration
@pytest.mark.parametrize("page", with_blocks("console", *SHELL), ids=lambda page: page.name)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command, output in commands_of(page):
        if elsewhere(command):
            continue
        words = shlex.split(command)
        if words[0] == "se-fx":
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                assert cli.main(words[1:]) == 0, command
            printed = stream.getvalue()
        else:
            assert words[0] == "python", f"{command}: neither a command that is run here, nor in ELSEWHERE"
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            process = subprocess.run(
                [sys.executable, ROOT / words[1], *words[2:]], env=environment, capture_output=True, text=True, check=False
            )
            assert process.returncode == 0, f"{command}: {process.stderr}"
            printed = process.stdout
        if output is not None:
            check_output(output, printed)


def test_commands_left_out_are_still_in_some_page() -> None:
    assert {elsewhere(command) for page in PAGES for command, _ in commands_of(page)} - {None} == set(ELSEWHERE)


# ---------------------------------------------------------------------------------------------------------------- output
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]\d+)?")


def check_output(shown: str, printed: str) -> None:
    """What a page shows is what is printed.

    Words and whole numbers are the same; a line ``...`` stands for any lines. Numbers with a point, which may come from
    training, agree within 15 % or 0.05, and shares of at least 10 % within 5 points: sums in another order change them, and
    another processor has another order. Rounding errors, below 1e-4, are no larger than a hundredfold.
    """
    match = re.fullmatch("".join(map(_pattern, _even(shown).splitlines())), _even(printed))
    assert match, f"shown:\n{shown}\nprinted:\n{printed}"
    for expected, got in zip(NUMBER.finditer(_even(shown)), match.groups(), strict=True):
        is_share = re.match(" ?%", _even(shown)[expected.end() :]) is not None
        assert _close(float(expected[0]), float(got), is_share), f"shown {expected[0]}, printed {got}:\n{printed}"


def _even(text: str) -> str:
    """Text without what depends on the widths of columns."""
    lines = (re.sub(r"-{2,}", "--", re.sub(r" +", " ", line)).strip() for line in text.strip().splitlines())
    return "".join(f"{line}\n" for line in lines)


def _pattern(line: str) -> str:
    if line == "...":
        return r"(?:.*\n)*?"
    return f"({NUMBER.pattern})".join(re.escape(part) for part in NUMBER.split(line)) + r"\n"


def _close(expected: float, got: float, is_share: bool) -> bool:
    if 0 < abs(expected) < 1e-4:
        return abs(got) < 100 * abs(expected)
    return math.isclose(expected, got, rel_tol=0.15, abs_tol=5 if is_share and expected >= 10 else 0.05)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a  1.00\n---\nb", "a 1.04\n-----\nb\n", True),
        ("a 1.00", "a 1.30", False),
        ("a 3 b", "a 4 b", False),
        ("a\n...\nz", "a\nb\nc\nz", True),
        ("a\n...\nz", "a\nb", False),
        ("18.9 % right", "22.6 % right", True),
        ("18.9% right", "24.6% right", False),
        ("1.9 % more", "2.9 % more", False),
        ("18.9 images", "22.6 images", False),
        ("apart by 2.1e-07", "apart by 9.0e-06", True),
        ("apart by 2.1e-07", "apart by 1.0e-03", False),
    ],
)
def test_output_is_compared(shown: str, printed: str, same: bool) -> None:
    with contextlib.nullcontext() if same else pytest.raises(AssertionError):
        check_output(shown, printed)


# ----------------------------------------------------------------------------------------------------- reference, links
def test_every_public_name_is_in_the_reference() -> None:
    reference = (ROOT / "docs/reference.md").read_text("utf-8")
    documented = set(re.findall(r"^\.\. auto\w+:: se_fx\.(\w+)$", reference, re.MULTILINE))
    assert documented == set(se_fx.__all__)


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(BLOCK.sub("", page.read_text("utf-8"))):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name}: {link}"


def anchors_of(page: Path) -> set[str]:
    """What a page's headings are linked to by, on GitHub and by MyST."""
    headings = re.findall(r"^#{1,6} (.+)$", BLOCK.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_whole(page: Path) -> None:
    """A blank line within a table makes text of the rows after it."""
    for table in re.findall(r"(?:^\|.*\n)+", BLOCK.sub("", page.read_text("utf-8")), re.MULTILINE):
        assert re.match(r".*\n\|[ :|-]+\|\n", table), f"{page.name}: {table}"


def test_tests_that_pages_name_exist() -> None:
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text("utf-8")):
            assert f"def {name}(" in tests, f"{page.name}: {name}"


@pytest.mark.parametrize("project", ["torch", "python"])
def test_inventories_are_what_their_script_writes(project: str) -> None:
    script = runpy.run_path(str(ROOT / "docs/_inventories/make.py"))
    packed = (ROOT / f"docs/_inventories/{project}.inv").read_bytes().split(b"zlib.\n", 1)[1]
    assert zlib.decompress(packed).decode().splitlines() == script["lines"](script[project.upper()])


def test_every_page_is_in_the_table_of_contents() -> None:
    entries = re.findall(r"^(?:.*<)?(\w+)>?$", "".join(t for lang, t in blocks_of(ROOT / "docs/index.md")), re.MULTILINE)
    assert {page.stem for page in PAGES} - {"README", "index"} <= set(entries)
