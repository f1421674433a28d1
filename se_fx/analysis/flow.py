"""Conv flow: which convs a module calls, at which resolutions, and which of them feed which. Runs on meta tensors.

No example input is at hand, and none is needed: an image of a made-up size is sent through. Graphs are interpreted; what is
called in them and has no graph runs its own code, on a copy, so that what can't be traced is looked into as well.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from se_fx.analysis.calls import called, modules_of
from se_fx.analysis.channels import UNKNOWN
from se_fx.capture import Snapshot, random_state, set_random_state
from se_fx.regions import clone, exchange_tensors, hooked

__all__ = ["ENLARGED", "ConvCall", "ConvFlow", "conv_flow", "reachable"]

#: From so many times the positions on, a map is larger than another; padding makes less of a difference.
ENLARGED = 2.25


@dataclass(frozen=True)
class ConvCall:
    """One call of a Conv2d.

    Attributes:
        conv: its name in the module.
        entered: positions of what it reads, N * H * W, and H * W.
        left: the same of what it returns.
        sources: the calls that what it reads comes from with no other conv in between.
    """

    conv: str
    entered: tuple[int, int]
    left: tuple[int, int]
    sources: frozenset[int]

    def is_raised_from(self, source: ConvCall) -> bool:
        """Whether it reads a larger map than another call has returned, and not because a map was cut into windows there."""
        return all(there >= ENLARGED * here for there, here in zip(self.entered, source.left, strict=True))


@dataclass(frozen=True)
class ConvFlow:
    """The calls of convs that were seen, in their order.

    Attributes:
        image: positions, N * H * W, of the largest input.
        calls: the calls.
        outputs: for each tensor that is returned, its positions, none if it is no map, and the calls that it comes from with no
            conv in between.
        missed: the names of convs that are called as well, as far as can be told, but could not be run.
    """

    image: int = 0
    calls: tuple[ConvCall, ...] = ()
    outputs: tuple[tuple[int, frozenset[int]], ...] = ()
    missed: frozenset[str] = frozenset()

    def convs(self) -> set[str]:
        """The names of all convs that were seen."""
        return {call.conv for call in self.calls}

    def renamed(self, name_of: Callable[[str], str]) -> ConvFlow:
        """The same with other names."""
        calls = tuple(dataclasses.replace(call, conv=name_of(call.conv)) for call in self.calls)
        return dataclasses.replace(self, calls=calls, missed=frozenset(map(name_of, self.missed)))

    def behind(self, convs: Collection[str]) -> set[str]:
        """The convs that read what comes from these, and these."""
        found: set[int] = set()
        for number, call in enumerate(self.calls):
            if call.conv in convs or call.sources & found:
                found.add(number)
        return {self.calls[number].conv for number in found}

    def upstream(self, numbers: Iterable[int]) -> set[int]:
        """These calls, and all that what they return comes from."""
        return reachable(numbers, lambda number: self.calls[number].sources)

    def aside(self) -> set[int]:
        """The calls whose results reach no output but as factors, or broadcast over a map: those of gates and contexts."""
        if not self.outputs:
            return set()
        return set(range(len(self.calls))) - self.upstream(source for _, sources in self.outputs for source in sources)

    def strides(self) -> dict[str, int]:
        """The total stride of what each conv returns at its first call: image by map, rounded to a power of two.

        A conv on a map of one position, or of a gate, has that of what it reads from.
        """
        found: list[int] = []
        aside = self.aside()
        for number, call in enumerate(self.calls):
            own = max(0, round(math.log2(self.image / call.left[0]) / 2))
            follows = call.entered[1] == 1 or number in aside
            found.append(max((found[source] for source in call.sources), default=own) if follows else own)
        strides: dict[str, int] = {}
        for call, power in zip(self.calls, found, strict=True):
            strides.setdefault(call.conv, 2**power)
        return strides


def reachable(begins: Iterable[int], onward: Callable[[int], Iterable[int]]) -> set[int]:
    """These calls, and all that one gets to from them, one step after the other."""
    found: set[int] = set()
    ahead = list(begins)
    while ahead:
        number = ahead.pop()
        if number not in found:
            found.add(number)
            ahead += onward(number)
    return found


def conv_flow(root: nn.Module, graphs: Mapping[str, fx.Graph]) -> ConvFlow:
    """What happens to an image, or to several maps, in a module.

    Args:
        root: the module. It is copied, and the copy's code run where there is no graph of it and it has no hooks.
        graphs: graphs of the module (under an empty name) and of modules within, by name.
    """
    best, convs = ConvFlow(), _called_convs(root, graphs)
    for inputs in filter(None, _arrangements(root, graphs.get(""))):
        for size in _SIZES:
            flow = _run(root, graphs, inputs, size)
            if len(flow.convs()) > len(best.convs()) or (_raises(flow) and not _raises(best)):
                best = flow
            if convs <= best.convs():
                break
        if _raises(best):
            break
    missed = frozenset() if "" not in graphs and best.outputs else frozenset(convs - best.convs())
    return dataclasses.replace(best, missed=missed)


def _raises(flow: ConvFlow) -> bool:
    return any(call.is_raised_from(flow.calls[source]) for call in flow.calls for source in call.sources)


_BATCH = 2
_SIZES = (512, 224, 256, 384)  # made up: most models take the first, some that attend are made for one of the others


def _arrangements(root: nn.Module, graph: fx.Graph | None) -> Iterator[dict[str, tuple[int, int]]]:
    """Channels of each input that leads to convs, and how much smaller it is: one image, or maps alike, or of a pyramid."""
    channels = _image_of_code(root) if graph is None else _maps_of(graph, root)
    yield {name: (width, 1) for name, width in channels.items()}
    if len(channels) > 1:
        for order in (range(len(channels)), reversed(range(len(channels)))):
            yield {name: (width, 2**power) for (name, width), power in zip(channels.items(), order, strict=True)}


def _called_convs(root: nn.Module, graphs: Mapping[str, fx.Graph]) -> set[str]:
    """The convs that graphs call, or that are in what they call; all of a module that has none."""
    nodes = [(path, node) for path, graph in graphs.items() for node in graph.nodes if node.op == "call_module"]
    targets = {f"{path}.{node.target}".lstrip(".") for path, node in nodes} - graphs.keys()
    everything = [name for name, module in root.named_modules() if isinstance(module, nn.Conv2d)]
    return {name for name in everything if "" not in graphs or any(f"{name}.".startswith(f"{each}.") for each in targets)}


def _maps_of(graph: fx.Graph, root: nn.Module) -> dict[str, int]:
    """The inputs of a graph that lead to convs, with the channels that the first of these takes."""
    modules = modules_of(root)
    found = {}
    for node in graph.nodes:
        seen, behind = {node}, [node] if node.op == "placeholder" else []
        while behind:
            value = behind.pop(0)
            conv = _first_conv(called(value, modules))
            if conv is not None:
                found[str(node.target)] = conv.in_channels
                break
            behind += [user for user in value.users if user not in seen]
            seen.update(value.users)
    return found


def _image_of_code(root: nn.Module) -> dict[str, int]:
    """The only argument that a module's code needs."""
    parameters = list(inspect.signature(type(root).forward).parameters.values())[1:]
    needed = [each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    conv = _first_conv(root)
    return {needed[0]: conv.in_channels} if len(needed) == 1 and conv is not None else {}


def _first_conv(module: nn.Module | None) -> nn.Conv2d | None:
    return next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None) if module is not None else None


def _run(root: nn.Module, graphs: Mapping[str, fx.Graph], inputs: Mapping[str, tuple[int, int]], size: int) -> ConvFlow:
    copied = _meta_copy(root)
    tape, returned = _Tape(copied), None
    randomness, before = random_state(), Snapshot(copied)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.device("meta"):
            maps = {
                name: torch.empty(_BATCH, width, size // smaller, size // smaller, dtype=tape.dtype)
                for name, (width, smaller) in inputs.items()
            }
            with tape:
                returned = _called(copied, "", graphs, (), maps)
    except Exception:  # whatever a model's code raises on inputs that it isn't made for
        pass
    finally:
        before.undo()
        set_random_state(randomness)
    outputs = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
    return ConvFlow(
        _BATCH * (size // min(smaller for _, smaller in inputs.values())) ** 2,
        tuple(tape.calls),
        tuple((_positions(value)[0] if value.dim() == 4 else 0, tape.sources_of(value)) for value in outputs),
    )


def _meta_copy(root: nn.Module) -> nn.Module:
    copied = clone(root)
    exchange_tensors(copied, lambda tensor: tensor.detach().to("meta"))
    for module in copied.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.training = False
    return copied


def _called(module: nn.Module, path: str, graphs: Mapping[str, fx.Graph], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What a module returns: by its graph, or by its code where no hook runs; a conv, by its weight, whatever hooks it has."""
    if path in graphs:
        return _Interpreter(module, path, graphs).returned(args, kwargs)
    if isinstance(module, nn.Conv2d) and hooked(module):
        source = next(iter((*args, *kwargs.values())))
        return F.conv2d(source, module.weight, None, module.stride, module.padding, module.dilation, module.groups)
    if any(map(hooked, module.modules())):
        return UNKNOWN
    return module(*args, **kwargs)


class _Interpreter(fx.Interpreter):
    """Runs a graph; what fails is unknown, and so is what follows from it."""

    def __init__(self, root: nn.Module, path: str, graphs: Mapping[str, fx.Graph]) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graphs[path])
        self.path, self.graphs = path, graphs

    def returned(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        given = iter(args)
        inputs = [(str(node.target), *(node.args or (UNKNOWN,))) for node in self.graph.nodes if node.op == "placeholder"]
        values = [kwargs[name] if name in kwargs else next(given, default) for name, default in inputs]
        return self.run(*values, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("placeholder", "output") and any(self.env[source] is UNKNOWN for source in n.all_input_nodes):
            return UNKNOWN
        try:
            return super().run_node(n)
        except Exception:  # whatever a model's code raises on sizes that it isn't made for
            return UNKNOWN

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.fetch_attr(target)
        return value.to("meta") if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        path = ".".join(filter(None, (self.path, str(target))))
        return _called(self.fetch_attr(target), path, self.graphs, args, kwargs)


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes calls of convs, recognised by their weights, and follows values from one to the next."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[ConvCall] = []
        self.dtype = next((each.dtype for each in root.parameters() if each.is_floating_point()), torch.float32)
        self._sources_of: dict[int, frozenset[int]] = {}  # by address of the storage
        self._owners_of: dict[int, frozenset[str]] = {}  # the convs whose weight it is, or is made from
        self._alive: list[Tensor] = []  # for as long as their storages' addresses are keys
        for name, module in root.named_modules():
            for weight in module.parameters() if isinstance(module, nn.Conv2d) else ():
                self._owners_of[_address(weight)] = frozenset({name})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_conv = func is torch.ops.aten.convolution.default and not args[6] and args[1].dim() == 4
        if is_conv:
            args = (_of_channels(args[0], args[1].shape[1] * args[8]), *args[1:])
        if func is torch.ops.aten.native_batch_norm.default:  # on meta tensors, it takes longer than all else together
            out: Any = tuple(args[0].new_empty(shape) for shape in (args[0].shape, args[0].shape[1:2], args[0].shape[1:2]))
        else:
            out = func(*args, **(kwargs or {}))
        operands, results = ([x for x in tree_leaves(given) if isinstance(x, Tensor)] for given in ((args, kwargs), out))
        if not results:
            return out
        sources, owners = self._sources(func, operands, results[0]), frozenset[str]()
        if is_conv and (names := self._owners(args[1])):
            self.calls.append(ConvCall(next(iter(names)), _positions(args[0]), _positions(out), self.sources_of(args[0])))
            sources = frozenset({len(self.calls) - 1})
        elif not sources:
            owners = owners.union(*map(self._owners, operands))
        for value in results:
            self._sources_of[_address(value)] = self.sources_of(value) | sources
            self._owners_of[_address(value)] = self._owners(value) | owners
        self._alive += results
        return out

    def sources_of(self, value: Tensor) -> frozenset[int]:
        return self._sources_of.get(_address(value), frozenset())

    def _owners(self, value: Tensor) -> frozenset[str]:
        return self._owners_of.get(_address(value), frozenset())

    def _sources(self, func: Any, operands: Sequence[Tensor], result: Tensor) -> frozenset[int]:
        """What a result comes from. What scales a map, or is broadcast over it, is not the map's own."""
        pointwise = torch.Tag.pointwise in func.tags
        full = [value for value in operands if not (pointwise and value.numel() < result.numel())]
        each = [self.sources_of(value) for value in full]
        if func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_) and result.dim() == 4:
            positions = _positions(result)[0]
            whole = [{s for s in found if self.calls[s].left[0] * ENLARGED > positions} for found in each if found]
            if any(len(kept) == len(found) for kept, found in zip(whole, filter(None, each), strict=True)):
                return frozenset[int]().union(*whole)
        return frozenset[int]().union(*each)


def _of_channels(value: Tensor, width: int) -> Tensor:
    """A map of so many channels in the place of one of others: inputs are made up, and sizes alone are asked for."""
    return value if value.shape[1] == width else value[:, :1].expand(-1, width, -1, -1)


def _positions(value: Tensor) -> tuple[int, int]:
    return value.shape[0] * value.shape[2] * value.shape[3], value.shape[2] * value.shape[3]


def _address(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)
