"""Forwards: what a rewritten module runs when it is called, as one function."""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import re
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import fx, nn

from se_fx.regions.freshness import INNER, is_fresh, refuse_stale
from se_fx.regions.surgery import refuse_surgery

__all__ = [
    "EXCITE",
    "UNSCALED",
    "Forward",
    "Forwards",
    "asking_once",
    "by_mode",
    "forward_of",
    "functions_of",
    "held_by",
    "is_leaf",
    "leads_to",
]

Forward = Callable[..., Any]
Forwards = Mapping[bool, Forward]  # by `training`

#: The keyword that graphs call a module with whose blocks they apply by themselves.
EXCITE = "excite"
#: The method that is `forward` without the blocks that scale what it returns.
UNSCALED = "_forward_unscaled"


def functions_of(graphs: Mapping[bool, fx.Graph] | None) -> dict[bool, Forward] | None:
    """The code of graphs, as functions of a module and the graphs' inputs."""
    if not graphs:
        return None
    made: dict[fx.Graph, Forward] = {}
    for graph in set(graphs.values()):
        with asking_once(graph):
            code = graph.python_code("self")
        names = dict(code.globals)
        exec(compile(code.src, "<the graph of a module>", "exec"), names)  # as fx does
        made[graph] = names["forward"]
    return {training: made[graph] for training, graph in graphs.items()}


def asking_once(graph: fx.Graph) -> AbstractContextManager[None]:
    """Within, code that is generated asks for a module that holds others once, not for each of these that it calls.

    Each step of a path through a model is a call of Python's, and in small networks all of them take longer than a convolution.
    """
    return graph.on_generate_code(lambda before: lambda body: _asking_once(before(body) if before else body))


def _asking_once(body: list[str]) -> list[str]:
    source = "".join(body)
    tree, lines = ast.parse(source), source.encode().split(b"\n")

    def text(node: ast.expr) -> str:
        return lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()

    paths = [(statement.lineno - 1, path, [*map(text, path)]) for statement in tree.body for path in _paths(statement)]
    first = {each: row for row, _, texts in reversed(paths) for each in texts}
    holders = {each: holder for _, _, texts in paths for holder, each in itertools.pairwise(["", *texts])}
    uses = Counter(texts[-1] for _, _, texts in paths) + Counter(holders.values())
    names, taken = {"": ""}, {*re.findall(r"\w+", source)}
    for each in holders:
        if uses[each] > 1:
            name = "_".join(re.findall(r"\w+", each.replace("getattr(", "")))
            while name in taken:
                name += "_"
            taken.add(name)
            names[each] = name
    for _, path, texts in reversed(paths):
        node, each = next((pair for pair in zip(reversed(path), reversed(texts), strict=True) if pair[1] in names), (None, ""))
        if node is not None:
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line[: node.col_offset] + names[each].encode() + line[node.end_col_offset :]
    for each in sorted(names.keys() - {""}, key=lambda each: (first[each], len(each)), reverse=True):
        holder = holders[each]
        while holder not in names:
            holder = holders[holder]
        lines.insert(first[each], f"{names[each]} = {each.replace(holder, names[holder], 1)}".encode())
    return [b"\n".join(lines).decode()]


def _paths(node: ast.AST) -> Iterator[list[ast.expr]]:
    """The modules on the way from the root, which isn't among them, to each of those that code asks for."""
    path: list[ast.expr] = []
    root = node
    if isinstance(node, ast.Name | ast.Constant):
        return
    while (holder := _asked_of(root)) is not None:
        path.insert(0, holder)
        root = holder
    if path and isinstance(root, ast.Name) and root.id == "self":
        yield from [path[1:]] if path[1:] else []
    else:
        for child in ast.iter_child_nodes(node):
            yield from _paths(child)


def _asked_of(node: ast.AST) -> ast.expr | None:
    """What an attribute is asked of."""
    if isinstance(node, ast.Attribute):
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 2:
        return node.args[0]
    return None


def by_mode(forwards: Forwards) -> Forward:
    """One function for both modes."""
    train, evaluate = forwards[True], forwards[False]
    if train is evaluate:
        return train

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A plain branch on `training`: torch.compile guards on it, and compiles each mode once.
        if self.training:
            return train(self, *args, **kwargs)
        return evaluate(self, *args, **kwargs)

    return functools.wraps(evaluate)(_anew(forward))


def forward_of(own: Any, region: Forwards | None, host: Forwards | None, *, excited: bool) -> Forward:
    """The region's graphs while they are fresh; else the host's, or the code; then the blocks on what that returns.

    The graphs of an `fx.GraphModule`, which nobody calls from another graph, have these blocks in them.
    """
    own_forward = own.forward
    in_region, in_host = by_mode(region) if region else None, by_mode(host) if host else None
    leaf = excited and is_leaf(own) and not issubclass(own, nn.Conv2d)

    def code(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_surgery(self)
        if in_host is not None and "_host_graphs" in self.__dict__:
            refuse_stale(self)
            return in_host(self, *args, **kwargs)
        if INNER in self.__dict__:
            return self.__dict__[INNER](*args, **kwargs)
        return own_forward(self, *args, **kwargs)

    def whole(self: Any, *args: Any, **kwargs: Any) -> Any:
        if in_region is None or "_graphs" not in self.__dict__ or not is_fresh(self):
            return code(self, *args, **kwargs)
        return in_region(self, *args, **kwargs)

    def scaled(self: Any, *args: Any, excite: bool = True, **kwargs: Any) -> Any:
        if isinstance(self, fx.GraphModule) and in_region is not None and is_fresh(self):
            return in_region(self, *args, **kwargs)
        value = _recorded(self, args, kwargs) if leaf and args and isinstance(args[0], fx.Proxy) else NotImplemented
        value = whole(self, *args, **kwargs) if value is NotImplemented else value
        if excite:
            for container, name in self.__dict__.get("_excited_by", ()):  # people make others of a module's class
                value = getattr(container, name)(value)
        return value

    return functools.wraps(own_forward)(_anew(scaled if excited else whole))


def is_leaf(own: type[nn.Module]) -> bool:
    """Whether tracers of others don't look into modules of a class."""
    return own.__module__.startswith("torch.nn.") and not issubclass(own, nn.Sequential)


def _recorded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call of a module in the graph that a tracer of others makes, as it would be if it scaled nothing."""
    tracer = args[0].tracer
    if not isinstance(tracer, fx.Tracer):
        return NotImplemented
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {**kwargs, EXCITE: False})


def _anew(function: Any) -> Forward:
    """The same function with code of its own: what compiles code counts how often it has had to."""
    code, defaults = function.__code__.replace(), function.__kwdefaults__
    copied = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = defaults
    return copied


def leads_to(value: Any, forward: Forward) -> bool:
    """Whether a function is a method of a module, or has one that it may call: wrapped, in a closure, or as a part."""
    seen: set[int] = set()
    open_ends = [value]
    while open_ends and len(seen) < 100:
        function = open_ends.pop()
        function = getattr(function, "__func__", function)
        if function is forward:
            return True
        if id(function) in seen or not callable(function):
            continue
        seen.add(id(function))
        open_ends += [getattr(function, name, None) for name in ("__wrapped__", "_torchdynamo_orig_callable", "func")]
        open_ends += held_by(function)
        open_ends += [*(getattr(function, "__defaults__", None) or ()), *(getattr(function, "args", None) or ())]
    return False


def held_by(function: Any) -> list[Any]:
    """What the closure of a function holds, as far as that is filled."""
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    return found
