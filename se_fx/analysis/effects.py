"""Effects: what running a node does besides yielding a value, and which values share memory.

All that rewrites and placements have to know of this, they ask here. Operators are asked themselves: each node is run by
itself on meta tensors in memory of their own, in both memory formats, at two sizes, and in the types that a cast may be to.
What comes back in an input's memory is an alias of it; the schemas of the operators that ran say what they wrote, and whether
they drew random numbers. Code that isn't PyTorch's, and what can't be run, *may* do anything with what it is given. So "no"
is certain everywhere here, and "yes" means "may".
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from se_fx.analysis.calls import Modules, called, holds_hooks_or_convs, runs_pytorch
from se_fx.analysis.channels import Values
from se_fx.analysis.probing import observe

__all__ = ["Effect", "Effects"]


@dataclass(frozen=True)
class Effect:
    """What running one node may do.

    Attributes:
        aliases: the inputs whose memory the result may be in.
        writes: the inputs whose memory it may change.
        returns: the one input that it returns, the very same tensor, if that is certain.
        escapes: whether the result may be in memory that outlives the call: a parameter's, a buffer's.
        remembers: whether anything else may change: a buffer, or the state of random numbers.
        known: whether all this is known, and not only to be feared.
        wrote: the inputs that it was seen to write to, and all where it couldn't be run: what is likely, even of unknown code.
        shared: the inputs whose memory its result was seen in, and all where it couldn't be run.
        pointwise: whether each element of the result is computed from the same elements of the inputs alone.
        computes: the operators it consists of, other than those that give elements as they are, in another order or shape.
        reads: the inputs whose elements matter to it, as opposed to their sizes, types and places.
    """

    aliases: frozenset[fx.Node]
    writes: frozenset[fx.Node]
    returns: fx.Node | None = None
    escapes: bool = True
    remembers: bool = True
    known: bool = False
    pointwise: bool = False
    computes: frozenset[Any] = frozenset()
    reads: frozenset[fx.Node] = frozenset()
    wrote: frozenset[fx.Node] = frozenset()
    shared: frozenset[fx.Node] = frozenset()


class Effects:
    """The effects of a graph's nodes. Stays right while the graph is edited.

    Args:
        root: the module that the graph's targets refer to.
        modules: its modules by name; new ones are to be put in.
        values: what its nodes yield.
    """

    def __init__(self, root: nn.Module, modules: Modules, values: Values) -> None:
        self._root, self._modules, self._values = root, modules, values
        self._memories: dict[str, Any] = {}
        self._known: dict[fx.Node, tuple[list[fx.Node], Effect]] = {}

    def of(self, node: fx.Node) -> Effect:
        """What running a node may do."""
        inputs = node.all_input_nodes
        known = self._known.get(node)
        if known is None or known[0] != inputs:
            known = self._known[node] = (inputs, self._found(node, inputs))
        return known[1]

    def _found(self, node: fx.Node, inputs: list[fx.Node]) -> Effect:
        nothing: frozenset[fx.Node] = frozenset()
        if node.op in ("placeholder", "get_attr", "output"):
            return Effect(nothing, nothing, remembers=node.op != "get_attr", known=True, reads=frozenset(inputs))
        module = called(node, self._modules)
        known = runs_pytorch(node, self._modules)
        if known and _allocates(module):
            return Effect(nothing, nothing, escapes=False, remembers=False, known=True, reads=frozenset(inputs))
        may_run = known or module is None or not holds_hooks_or_convs(module)
        seen = observe(node, self._root, {source: self._values.of(source) for source in inputs}) if may_run else None
        everything = frozenset(inputs)
        if seen is None or not known:
            wrote, shared = (frozenset(seen.writes), frozenset(seen.aliases)) if seen is not None else (everything, everything)
            return Effect(everything, everything, reads=everything, wrote=wrote, shared=shared)
        return Effect(
            frozenset(seen.aliases),
            frozenset(seen.writes),
            seen.returns,
            seen.escapes,
            seen.remembers,
            known=True,
            pointwise=seen.pointwise,
            computes=frozenset(seen.computes),
            reads=frozenset(seen.reads | seen.aliases | seen.writes),
            wrote=frozenset(seen.writes),
            shared=frozenset(seen.aliases),
        )

    def names(self, value: fx.Node, without: fx.Node | None = None) -> set[fx.Node]:
        """All nodes whose results may share memory with that of `value`, itself included; `without` is taken for none."""
        found, open_ends = {value}, [value]
        while open_ends:
            for node in self._neighbours(open_ends.pop()):
                if node not in found and node is not without:
                    found.add(node)
                    open_ends.append(node)
        return found

    def _neighbours(self, node: fx.Node) -> Iterator[fx.Node]:
        yield from self.of(node).aliases
        yield from (user for user in node.users if node in self.of(user).aliases)
        if node.op == "placeholder":
            yield from node.graph.find_nodes(op="placeholder", sort=False)
        elif node.op == "get_attr":
            memory, attributes = self._memory(str(node.target)), node.graph.find_nodes(op="get_attr", sort=False)
            yield from (other for other in attributes if self._memory(str(other.target)) == memory)

    def _memory(self, attribute: str) -> Any:
        """The memory of an attribute that is a tensor; of others, their name."""
        if attribute not in self._memories:
            found = operator.attrgetter(attribute)(self._root)
            self._memories[attribute] = found.untyped_storage()._cdata if isinstance(found, Tensor) else attribute
        return self._memories[attribute]

    def readers(self, value: fx.Node) -> list[fx.Node]:
        """Who reads a value, other than to ask for its size, type or place."""
        return [user for user in value.users if value in self.of(user).reads]

    def may_change(self, value: fx.Node, after: fx.Node, before: fx.Node) -> bool:
        """Whether the memory of `value` may be written between two nodes."""
        return any(after < user < before for user in self.writers(value))

    def writers(self, value: fx.Node) -> Iterator[fx.Node]:
        """The nodes that may write to the memory of `value`, under any of its names."""
        for name in self.names(value):
            yield from (user for user in name.users if name in self.of(user).writes)

    def may_be_given_a_copy(self, value: fx.Node, readers: Collection[fx.Node]) -> bool:
        """Whether some readers of a value could read a copy, made before the first of them, and nobody would see that.

        They would if either side was seen to write to the memory, under any name, and the other to read it afterwards; what
        only unknown code may do is left aside.
        """
        ours = list(self._seen_to_use(value, readers))
        theirs = self._seen_to_use(value, [user for user in value.users if user not in readers])
        first, last = min(readers), max(reader for reader, _ in ours)
        return not any(writes for _, writes in ours) and not any(writes and first < user < last for user, writes in theirs)

    def _seen_to_use(self, value: fx.Node, users: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, bool]]:
        """These users of a value and those of the names that they give it; whether each was seen to write to it."""
        seen, open_ends = set(), [(value, user) for user in users]
        while open_ends:
            name, user = open_ends.pop()
            if (name, user) not in seen:
                seen.add((name, user))
                effect = self.of(user)
                yield user, name in effect.wrote
                open_ends += [(user, other) for other in user.users] if name in effect.shared else []

    def is_forgotten(self, value: fx.Node, last: fx.Node) -> bool:
        """Whether nobody reads or writes the memory of `value` after `last`, which reads it, other than by its result."""
        names = self.names(value, without=last)
        late = any(user > last and name in self.of(user).reads for name in names for user in name.users)
        return not late and not any(self.of(name).escapes for name in names)

    def is_own(self, value: fx.Node) -> bool:
        """Whether a value is in memory that was allocated for it, or for what was changed in place to make it."""
        effect = self.of(value)
        while effect.returns is not None and effect.returns in effect.writes:
            effect = self.of(effect.returns)
        return effect.known and not effect.aliases and not effect.escapes

    def is_idle(self, node: fx.Node) -> bool:
        """Whether nothing is lost with a node that nobody reads: it only computes, or changes what nobody reads any more."""
        effect = self.of(node)
        return effect.known and not effect.remembers and all(self.is_forgotten(value, node) for value in effect.writes)


def _allocates(module: nn.Module | None) -> bool:
    """Whether a module of PyTorch's is one of the most common, which need not be run: a convolution, a norm that only reads."""
    if module is not None and type(module).forward is nn.BatchNorm2d.forward:
        return not module.training
    return module is not None and type(module).forward in (nn.Conv2d.forward, nn.Linear.forward)
