"""Probing: one node is run by itself on meta tensors, and what its operators did is written down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from se_fx.analysis.calls import on_meta
from se_fx.analysis.channels import UNKNOWN
from se_fx.capture import random_state, set_random_state

__all__ = ["Observed", "observe"]


@dataclass
class Observed:
    """What one node has been seen to do, in any of the ways it was run; see `Effect` for what the attributes mean."""

    aliases: set[Any] = field(default_factory=set)
    writes: set[Any] = field(default_factory=set)
    returns: Any = None
    escapes: bool = False
    remembers: bool = False
    pointwise: bool = True
    computes: set[Any] = field(default_factory=set)
    casts: bool = False
    reads: set[Any] = field(default_factory=set)


def observe(node: fx.Node, root: nn.Module, inputs: Mapping[fx.Node, tuple[Any, ...]]) -> Observed | None:
    """Run a node in several ways; None where it can't be run.

    Args:
        node: the node.
        root: the module that its target refers to.
        inputs: what each of its inputs is, in several ways; `UNKNOWN` is taken for some feature map.
    """
    places = {source: position for position, source in enumerate(inputs)}
    key = _key(node, root, inputs, places)
    if key is None or key not in _seen:
        seen = _observed(node, root, inputs)
        if key is None or seen is None:
            return seen
        _seen[key] = _moved(seen, places)
        while len(_seen) > _MOST:
            del _seen[next(iter(_seen))]
    return _moved(_seen[key], dict(enumerate(inputs)))


def _observed(node: fx.Node, root: nn.Module, inputs: Mapping[fx.Node, tuple[Any, ...]]) -> Observed | None:
    seen, randomness = Observed(), random_state()
    sizes = range(max(map(len, inputs.values()), default=1))
    try:
        with torch.inference_mode(False), torch.no_grad():
            ran = [_run(node, root, _fresh(inputs, size, bool(size)), seen) for size in sizes]
            ran += [_run(node, root, _fresh(inputs, size, not size), seen) for size in sizes if node.op != "call_module"]
            if seen.casts:
                ran += [_run(node, root, _fresh(inputs, 0, False, dtype), seen) for dtype in _TYPES]
    finally:
        set_random_state(randomness)
    return seen if any(ran) else None


_seen: dict[Any, Observed] = {}  # by what was called on what; in its sets, positions stand for inputs
_MOST = 4096


def _key(node: fx.Node, root: nn.Module, inputs: Mapping[fx.Node, tuple[Any, ...]], places: Mapping[fx.Node, int]) -> Any:
    """What two calls have in common that do the same; None where that can't be told."""
    target: Any = node.target
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if [*module.children(), *module.parameters(), *module.buffers()]:
            return None
        target = (type(module), repr(sorted((k, v) for k, v in module.__dict__.items() if not k.startswith("_"))))
    call = repr(fx.map_arg((node.args, node.kwargs), lambda source: _Place(places[source])))
    values = [tree_map_only(Tensor, lambda t: (tuple(t.shape), str(t.dtype)), value) for value in inputs.values()]
    return (node.op, target, call, repr(["unknown" if UNKNOWN in leaves else leaves for leaves in values]))


class _Place(int):
    """The position of an input, which no number is taken for."""

    def __repr__(self) -> str:
        return f"<{int(self)}>"


def _moved(seen: Observed, places: Mapping[Any, Any]) -> Observed:
    """With other things in the place of inputs."""
    aliases, writes, reads = ({places[source] for source in sources} for sources in (seen.aliases, seen.writes, seen.reads))
    returns = None if seen.returns is None else places[seen.returns]
    return dataclasses.replace(seen, aliases=aliases, writes=writes, reads=reads, returns=returns)


#: The types that casts are from and to: where none is needed, there may be no copy.
_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _fresh(
    inputs: Mapping[fx.Node, tuple[Any, ...]], size: int, channels_last: bool, dtype: torch.dtype | None = None
) -> dict[fx.Node, Any]:
    """Inputs in memory of their own, of one of their sizes, in a memory format, perhaps of another type."""
    known = [value[size] for value in inputs.values() if isinstance(value[size], Tensor) and value[size].ndim == 4]
    some_map = known[0] if known else torch.empty(2 + size, 3, 8, 8 + 4 * size, device="meta")

    def fresh(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if channels_last and tensor.ndim == 4 else torch.contiguous_format
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, device="meta", dtype=kind, memory_format=layout)

    values = {source: some_map if value[size] is UNKNOWN else value[size] for source, value in inputs.items()}
    return {source: tree_map_only(Tensor, fresh, value) for source, value in values.items()}


def _run(node: fx.Node, root: nn.Module, inputs: Mapping[fx.Node, Any], seen: Observed) -> bool:
    """Run a node once, and note what it does; returns whether it could be run."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: inputs[source])
    call, state = _called(node, root)
    watch = _Watch()
    try:
        with watch:
            result = call(*args, **kwargs)
    except Exception:  # whatever an operator raises on what it isn't made for
        return False
    of_inputs = {storage: source for source, value in inputs.items() for storage in _storages(value)}
    of_result = set(_storages(result))
    of_state = {storage for tensor in state for storage in _storages(tensor)}
    seen.aliases |= {source for storage, source in of_inputs.items() if storage in of_result}
    seen.writes |= {source for storage, source in of_inputs.items() if storage in watch.written}
    seen.escapes |= bool(of_result & of_state) or any(_overlaps(leaf) for leaf in tree_leaves(result))
    seen.remembers |= watch.drew or bool(watch.written & of_state)
    seen.pointwise &= watch.pointwise
    seen.casts |= watch.casts
    seen.computes |= watch.computes
    seen.reads |= {source for storage, source in of_inputs.items() if storage in watch.read}
    seen.returns = next((source for source, value in inputs.items() if isinstance(value, Tensor) and value is result), None)
    return True


def _called(node: fx.Node, root: nn.Module) -> tuple[Callable[..., Any], list[Tensor]]:
    """What a node calls, and the tensors that it has of its own."""
    if node.op == "call_function":
        return node.target, []  # type: ignore[return-value]
    if node.op == "call_method":
        return lambda value, *args, **kwargs: getattr(value, str(node.target))(*args, **kwargs), []
    return on_meta(root.get_submodule(str(node.target)))


def _storages(value: Any) -> Iterator[int]:
    return (leaf.untyped_storage()._cdata for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _overlaps(leaf: Any) -> bool:
    """Whether several elements of a tensor are in one place, as after `expand`."""
    return isinstance(leaf, Tensor) and any(s == 0 and n > 1 for s, n in zip(leaf.stride(), leaf.shape, strict=True))


_aten = torch.ops.aten
#: Operators that make other tensors like the ones they are given.
_OF_SHAPES = {
    _aten.new_empty,
    _aten.new_zeros,
    _aten.new_ones,
    _aten.new_full,
    _aten.empty_like,
    _aten.zeros_like,
    _aten.ones_like,
}
_OF_SHAPES |= {_aten.new_empty_strided, _aten.full_like, _aten.rand_like, _aten.randn_like, _aten.randint_like}
#: Operators that give elements as they are.
_COPIES = {_aten.clone, _aten._unsafe_view, _aten._reshape_copy, _aten.view_copy}
#: Operators that compute each element by itself, though they have no tag that says so.
_ELEMENTWISE = {_aten._to_copy, _aten.clone, _aten.rsub, _aten.hardswish, _aten.hardswish_}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator that runs, however it was called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()
        self.read: set[int] = set()
        self.computes: set[Any] = set()
        self.drew, self.pointwise, self.casts = False, True, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parameters = func._schema.arguments
        given = {parameter.name: value for parameter, value in zip(parameters, args, strict=False)} | kwargs
        trains = given.get("training") is True or given.get("train") is True
        for parameter in parameters:
            # Norms update their statistics without saying so.
            says = parameter.alias_info is not None and parameter.alias_info.is_write
            if says or (trains and parameter.name in ("running_mean", "running_var")):
                self.written.update(_storages(given.get(parameter.name)))
        if func.overloadpacket not in _OF_SHAPES:
            self.read.update(_storages((args, kwargs)))
        self.drew |= torch.Tag.nondeterministic_seeded in func.tags
        is_view = not func._schema.is_mutable and any(r.alias_info is not None for r in func._schema.returns)
        makes = not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        if not is_view and func.overloadpacket not in _COPIES:
            self.computes.add(func.overloadpacket)
        self.pointwise &= torch.Tag.pointwise in func.tags or func.overloadpacket in _ELEMENTWISE or is_view or makes
        self.casts |= func.overloadpacket is _aten._to_copy
        return func(*args, **kwargs)
