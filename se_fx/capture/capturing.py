"""Capture: from a model to graph regions that run exactly as the model did.

A *region* is a module captured as one graph. What can't be traced is made *opaque*: it stays a `call_module` in the graph
around it and runs its own code, and what it calls is captured region by region, down to a lone `nn.Conv2d`. So any
model is captured, in as many regions as it takes. Knows nothing of Squeeze-and-Excitation.

    ResNet                 one region, the root
    Faster R-CNN           runs its own code; regions backbone.body, backbone.fpn.inner_blocks.0.0, ...

Tracing happens on a scratch clone, so that whatever a model's code does to itself while traced is thrown away.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from se_fx.capture.calls import Call
from se_fx.capture.plain import check_plain, closed_parts, is_conv
from se_fx.capture.randomness import random_state, set_random_state
from se_fx.capture.tracing import Tracing, Untraceable
from se_fx.regions import Inserted, clone, restore_code

__all__ = ["Capture", "Region", "capture", "collector_paused", "is_foreign"]


@dataclass(frozen=True)
class Region:
    """A module captured as graphs, or a lone Conv2d called from code that isn't.

    Attributes:
        path: qualified name in the model; empty at the root.
        module: the module the graphs' targets refer to, in a scratch clone of the model. To be read, never run.
        graphs: the graph by `training`, one object under both keys where the modes agree; None for a lone Conv2d.
        constants: tensors that the model's code made while being traced, by the attribute name the graphs use.
        calls: the tree of calls behind each graph.
    """

    path: str
    module: nn.Module
    graphs: dict[bool, fx.Graph] | None
    constants: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[fx.Graph, Call] = field(default_factory=dict)

    def convs(self) -> dict[nn.Module, str]:
        """The Conv2d modules the region calls, with their names in it; a lone Conv2d's is empty."""
        if self.graphs is None:
            return {self.module: ""}
        called = {str(node.target) for graph in self.graphs.values() for node in graph.nodes if node.op == "call_module"}
        modules = dict(self.module.named_modules(remove_duplicate=False))
        return {modules[name]: name for name in sorted(called) if isinstance(modules[name], nn.Conv2d)}

    def entered(self) -> tuple[str, ...]:
        """The names in it of the modules whose code is in its graphs, its own, which is empty, first."""
        return tuple(sorted({call.path for root in self.calls.values() for call in root.all()}))

    def qualified(self, name: str) -> str:
        """The name in the model of what is called `name` in the region."""
        return ".".join(filter(None, (self.path, name)))


@dataclass(frozen=True)
class Capture:
    """A model's regions.

    Attributes:
        model: the model, untouched.
        regions: its regions, in the order of its modules.
        opaque: the modules that run their own code, by qualified name (the root's is empty), each with the reason.
        closed: those of them that nothing can be put into: compiled and scripted parts.
    """

    model: nn.Module
    regions: tuple[Region, ...]
    opaque: dict[str, str]
    closed: frozenset[str] = frozenset()

    def within_closed(self, name: str) -> str | None:
        """The closed part that a module of this name is, or is within; None where there is none."""
        return next((part for part in self.closed if name == part or name.startswith(f"{part}.")), None)


def capture(model: nn.Module, *, finely: bool = False, training: bool = False) -> Capture:
    """Capture `model` in as few regions as it allows. The model is left as it is.

    Args:
        model: any module.
        finely: look into all modules that aren't PyTorch's own: normalisation and attention of others, subclasses of
            `nn.Conv2d`, inserted blocks; and in eval mode only. Otherwise into those that hold a Conv2d, in both modes.
        training: in training mode, look into all that have parameters as well, but for norms, whose own mode may change.

    Raises:
        SqueezeExciteError: `model` is not an `nn.Module`, or is wrapped, compiled, scripted or not initialised yet.
    """
    check_plain(model)
    with collector_paused():
        return _captured(model, finely, training)


def _captured(model: nn.Module, finely: bool, training: bool) -> Capture:
    scratch = _clone_with_code(model)
    closed = closed_parts(scratch)
    shut = {part for name in closed for part in scratch.get_submodule(name).modules()}
    entered = _entered(scratch, shut, finely)
    finer = set(filter(_is_looked_into_in_training, set(scratch.modules()) - shut)) if training else set()
    names = {id(module): name for name, module in scratch.named_modules()}
    modes = (False,) if finely and not training else (True, False)
    regions: list[Region] = []
    written: set[int] = set()
    inlined: set[int] = set()
    holding = _with_convs(closed, scratch)
    opaque = dict(holding)

    def visit(module: nn.Module) -> None:
        path = names[id(module)]
        if path in {region.path for region in regions} or module in shut:
            return
        if isinstance(module, nn.Conv2d):
            regions.append(Region(path, module, None))
        if module not in entered | finer or isinstance(module, nn.Conv2d):
            return
        try:
            tracing = Tracing(module, entered, modes, written, bool(path), finer)
            region = Region(path, module, tracing.graphs(), tracing.constants, tracing.calls)
        except Untraceable as untraceable:
            opaque[path] = str(untraceable)
            for child in _called_children(module, untraceable.called):
                visit(child)
            return
        regions.append(region)
        inlined.update(tracing.inlined())
        for name in tracing.opaque:
            visit(module.get_submodule(name))

    with _tracing_lock:
        randomness = random_state()
        try:
            visit(scratch)
            while written & inlined:  # a graph holds what code has written that was traced after it
                for found in (regions, inlined, opaque):
                    found.clear()
                opaque.update(holding)
                visit(scratch)
        finally:
            set_random_state(randomness)
    _share(regions, scratch)
    order = {name: position for position, name in enumerate(names.values())}
    return Capture(model, tuple(sorted(regions, key=lambda region: order[region.path])), opaque, frozenset(holding))


def _share(regions: list[Region], scratch: nn.Module) -> None:
    """A Conv2d that more than one region calls becomes a region of its own."""
    callers: dict[nn.Module, set[str]] = {}
    for region in regions:
        for module in region.convs():
            callers.setdefault(module, set()).add(region.path)
    names = {module: name for name, module in scratch.named_modules()}
    alone = {region.path for region in regions if region.graphs is None}
    regions += [
        Region(names[conv], conv, None) for conv, paths in callers.items() if len(paths) > 1 and names[conv] not in alone
    ]


def _called_children(module: nn.Module, called: set[str]) -> Iterator[nn.Module]:
    """The modules that an untraceable module's code calls, as far as can be told without running it."""
    for name, child in module.named_children():
        if isinstance(child, torch.jit.ScriptModule):
            continue
        calls = name in called
        bypassed = not calls and any(other.startswith(name + ".") for other in called)
        # A Sequential may as well be iterated by its owner; so may any container without a forward.
        container = type(child).forward in (nn.Module.forward, nn.Sequential.forward)
        if calls or not (bypassed or container):
            yield child
        else:
            yield from _called_children(
                child, {other.removeprefix(name + ".") for other in called if other.startswith(name + ".")}
            )


_tracing_lock = threading.RLock()  # one patch of nn.Module at a time


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Graphs are cycles, and hundreds of thousands of objects: the collector would walk them over and over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _clone_with_code(model: nn.Module) -> nn.Module:
    scratch = clone(model)
    for module in scratch.modules():
        if not module.__dict__.get("_edited") and module.__dict__.get(
            "_replaceable", True
        ):  # its code holds the same, and says what calls what
            restore_code(module, hosts=False)
    return scratch


def _entered(model: nn.Module, shut: set[nn.Module], finely: bool) -> set[nn.Module]:
    """The modules whose code is to be looked into."""
    return set(filter(is_foreign, set(model.modules()) - shut)) if finely else _conv_holders(model) - shut


def _with_convs(closed: dict[str, str], model: nn.Module) -> dict[str, str]:
    """Those closed parts that hold Conv2d layers."""
    return {name: reason for name, reason in closed.items() if any(map(is_conv, model.get_submodule(name).modules()))}


def _conv_holders(model: nn.Module) -> set[nn.Module]:
    """All modules that hold an `nn.Conv2d`."""
    holders: set[nn.Module] = set()

    def holds(module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            return True
        found = [holds(child) for child in module.children() if not isinstance(child, Inserted)]
        if any(found):
            holders.add(module)
        return module in holders

    holds(model)
    return holders


def _is_looked_into_in_training(module: nn.Module) -> bool:
    return is_foreign(module) and any(True for _ in module.parameters()) and not isinstance(module, (_NormBase, nn.GroupNorm))


def is_foreign(module: nn.Module) -> bool:
    """Whether a module's code isn't PyTorch's own."""
    home = type(module).forward.__module__ or ""  # the code of an fx.GraphModule has none
    return isinstance(module, nn.Sequential) or not home.startswith("torch.nn")
