"""The directive `command-help`: what `se-fx --help` and each command's help say, asked while the pages are built."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any
from unittest import mock

from docutils import nodes
from se_fx.cli import main
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class CommandHelp(SphinxDirective):
    """Takes the command's words, such as ``report``; none for `se-fx` itself."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The help as a block of text."""
        words = [*self.arguments, "--help"]
        said = io.StringIO()
        plain = mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"})
        with plain, contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main(words)
        text = said.getvalue()
        if self.arguments:  # all commands end with the same examples
            text = text.partition("\nexamples:\n")[0]
        return [nodes.literal_block(text, f"$ se-fx {' '.join(words)}\n{text}", language="console")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
