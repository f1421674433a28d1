"""The command line: words in, tables, JSON and files out. Knows nothing but the public names."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from se_fx.cli.commands import COMMANDS
from se_fx.cli.parser import parser
from se_fx.errors import SqueezeExciteError

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        found, result, text = COMMANDS[arguments.command][0](arguments)
    except (SqueezeExciteError, OSError) as error:
        print(f"se-fx: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if arguments.json else text)
    return 0 if len(found) else 1
