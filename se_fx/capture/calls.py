"""Calls: who called whom while a module was traced, with what, and what came back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

__all__ = ["Call"]


@dataclass(eq=False)
class Call:
    """One call of a module that was looked into.

    Traced values are nodes in what it was given and what it returned; all else is as the code had it.

    Attributes:
        path: the module's qualified name in the root; empty for the root's own.
        caller: the call whose code made it; None for the root's own.
        args: what it was given by position.
        kwargs: what it was given by name.
        steps: what its code did, in order: operators and calls of other modules, as nodes; calls of those looked into.
        returned: what it returned.
    """

    path: str
    caller: Call | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    steps: list[fx.Node | Call] = field(default_factory=list)
    returned: Any = None

    def all(self) -> Iterator[Call]:
        """This call, and those within it."""
        yield self
        for step in self.steps:
            if isinstance(step, Call):
                yield from step.all()

    def rename(self, value: fx.Node, statement: fx.Node, since: bool = False) -> bool:
        """Have calls take and return a statement's node for the value that it changes in place, from there on.

        Args:
            value: what was read before.
            statement: what is read for it after it has run.
            since: whether it has run before this call.

        Returns:
            Whether it has run by the end of this call.
        """

        def renamed(node: fx.Node) -> fx.Node:
            return statement if node is value else node

        for step in self.steps:
            if isinstance(step, Call):
                if since:
                    step.args, step.kwargs = fx.node.map_arg((step.args, step.kwargs), renamed)
                since = step.rename(value, statement, since)
            since = since or step is statement
        if since:
            self.returned = fx.node.map_arg(self.returned, renamed)
        return since
