"""The code of pages that the tests of pages don't run by themselves, since it downloads, or needs packages of others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["code_of"]

DOCS = Path(__file__).parents[1] / "docs"


def code_of(page: str, replaced: Mapping[str, str], number: int = 0) -> str:
    """A page's code, the block of this number, with something else for what it downloads."""
    text = (DOCS / page).read_text("utf-8")
    code: str = re.findall(r"^```\{code-block\} python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[number]
    for old, new in replaced.items():
        assert code.count(old) == 1, f"{page} has no {old} any more, or several"
        code = code.replace(old, new)
    return code
