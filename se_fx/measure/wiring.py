"""Wiring: which module's weights may take the gate of a block, told from the graphs of a rewritten model."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from se_fx.analysis import Modules, called, modules_of
from se_fx.capture import Capture
from se_fx.insertion import block_names
from se_fx.regions import excitement, hooked, own_class

__all__ = ["Kept", "Wiring"]


class Kept(Exception):
    """A block stays; the message says why."""


#: What may take a gate: modules whose value is, channel by channel, linear in `weight` and `bias` together.
_PRODUCERS = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm2d)


class Wiring:
    """What the graphs of a rewritten model call and read, and whose parameters are whose."""

    def __init__(self, rewritten: nn.Module, capture: Capture) -> None:
        self.root = rewritten
        self.blocks = block_names(rewritten)
        self.names: dict[nn.Module, str] = {module: name for name, module in rewritten.named_modules()}
        self.called: dict[fx.Node, nn.Module] = {}
        self.calls: dict[nn.Module, list[fx.Node]] = {}
        self.region: dict[fx.Graph, nn.Module] = {}
        self.read: set[nn.Module] = set()  # by graphs, past their calls
        self.owners: dict[Tensor, list[str]] = {}
        for name, parameter in rewritten.named_parameters(remove_duplicate=False):
            self.owners.setdefault(parameter, []).append(name)
        for region in capture.regions:
            if region.graphs is not None:
                module = rewritten.get_submodule(region.path)
                for graph in set(region.graphs.values()):  # one, where the modes agree
                    self.region[graph] = module
                    self._note(graph, modules_of(module))

    def _note(self, graph: fx.Graph, modules: Modules) -> None:
        for node in graph.nodes:
            module = called(node, modules)
            if module is not None:
                self.called[node] = module
                self.calls.setdefault(module, []).append(node)
            elif node.op == "get_attr":
                self.read.add(modules[str(node.target).rpartition(".")[0]])

    def producer(self, site: str) -> str:
        """The qualified name of the module whose weights can take the gate of the block at `site`.

        Raises:
            Kept: there is none.
        """
        block = self.root.get_submodule(self.blocks[site])
        if hooked(block):
            raise Kept("its block has hooks")
        if block in self.calls:
            producer = bare = self._scaled_by(block)
        else:  # of a lone conv: the block acts at each of its calls, as its weights do
            producer = bare = self.root.get_submodule(site)
        name = self.names[producer]
        self._check_plain(name, producer)
        if hooked(bare) and all(getattr(container, inner) is not block for container, inner in excitement(bare)):
            raise Kept(f"{name} has hooks, which see its value unscaled")
        return name

    def _scaled_by(self, block: nn.Module) -> nn.Module:
        """The module whose value a block in graphs scales, for all readers."""
        values = {node.all_input_nodes[0] for node in self.calls[block]}  # one, or one in each mode
        for value in values:
            if value not in self.called:
                raise Kept(f"it scales what {value.name} returns, which is no module's value")
        producers = {self.called[value] for value in values}
        producer = producers.pop()
        calls = self.calls[producer]
        graphs = {node.graph for node in calls}
        if producers:
            raise Kept("it scales the values of several modules")
        if len(calls) > len(graphs) or len({self.region[graph] for graph in graphs}) > 1:
            raise Kept(f"{self.names[producer]} is called several times")
        if values != set(calls) or any(len(value.users) > 1 for value in values):
            raise Kept(f"what {self.names[producer]} returns is read by others too")
        return producer

    def _check_plain(self, name: str, module: nn.Module) -> None:
        if is_parametrized(module):
            raise Kept(f"{name} is parametrized")
        kind = next((kind for kind in _PRODUCERS if isinstance(module, kind)), nn.Module)
        own = own_class(module)
        inherits = all(getattr(own, code, None) is getattr(kind, code, None) for code in ("forward", "_conv_forward"))
        if kind is nn.Module or not inherits or "forward" in vars(module):
            raise Kept(f"it scales what {name} returns, a {type(module).__name__}: no plain Conv2d or norm")
        if type(module._parameters.get("weight")) is not nn.Parameter:
            raise Kept(f"{name} has no weight of its own")
        for parameter in module.parameters(recurse=False):
            first, *others = self.owners[parameter]
            if others:
                raise Kept(f"{first} is also {others[0]}")
        if module in self.read:
            raise Kept(f"weights of {name} are read in another way too")
