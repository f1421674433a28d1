"""The pass: inserts calls of blocks into one graph."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from se_fx.errors import SqueezeExciteError
from se_fx.placement import Spot

__all__ = ["InsertBlocks"]


class InsertBlocks(PassBase):
    """Inserts `call_module` nodes that scale given values, and has their readers read what these return.

    Two blocks on one value follow each other, whichever is inserted first.

    Args:
        blocks: for each block its target in the graph module, the module, and where it goes.
    """

    def __init__(self, blocks: Iterable[tuple[str, nn.Module, Spot]]) -> None:
        self.blocks = tuple(blocks)

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check that every node belongs to this graph.

        Raises:
            SqueezeExciteError: one doesn't.
        """
        present = set(graph_module.graph.nodes)
        for target, _, spot in self.blocks:
            for node in (*spot.nodes, *(spot.readers or ())):
                if node not in present:
                    raise SqueezeExciteError(
                        f"block {target!r}: the node {node.name!r} is not in this graph, of which spots must be"
                    )

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check that what readers read is computed before them: of all that `Graph.lint` checks, what this pass could break."""
        position = {node: number for number, node in enumerate(graph_module.graph.nodes)}
        targets = {target for target, _, _ in self.blocks}
        for node in graph_module.graph.nodes:
            if node.target in targets:
                assert all(position[source] < position[node] for source in node.all_input_nodes)
                assert all(position[node] < position[user] for user in node.users)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Edit the graph in place. Its code is left to whoever will run it to generate: that takes as long as all else."""
        graph = graph_module.graph
        scaled_by_all: dict[fx.Node, fx.Node] = {}
        for target, block, spot in self.blocks:
            graph_module.add_submodule(target, block)
            for node in spot.nodes:
                value = scaled_by_all.get(node, node)
                readers = [user for user in value.users if spot.readers is None or user in spot.readers]
                # For some readers alone, as late as they allow: the value may be changed in place until then.
                with graph.inserting_after(value) if spot.readers is None else graph.inserting_before(min(readers)):
                    scaled = graph.call_module(target, (value,))
                for reader in readers:
                    reader.replace_input_with(value, scaled)
                if spot.readers is None:
                    scaled_by_all[node] = scaled
                scaled.meta["nn_module_stack"] = {
                    **node.meta.get("nn_module_stack", {}),
                    target: (target, type(block)),
                }
                if "stack_trace" in node.meta:
                    scaled.meta["stack_trace"] = node.meta["stack_trace"]
        return PassResult(graph_module, bool(self.blocks))
