"""Tensors that are neither parameters nor buffers: code that is only looked at changes none, and graphs freeze none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import se_fx
from se_fx.capture.snapshot import Snapshot

X = torch.rand(2, 3, 8, 8)


class Holder:
    def __init__(self) -> None:
        self.n, self.calls = torch.ones(1), 0


def a_class(change: Callable[[Any], None], read: Callable[[Any], Any]) -> type[nn.Module]:
    """A class of modules whose code does this to its state at each call, and scales by that."""

    class Stateful(nn.Module):
        of_class, held, calls = torch.ones(1), {"n": 1}, 0

        def __init__(self, conv: bool) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3) if conv else nn.Identity()
            self.n, self.nested, self.pair = torch.ones(1), {"n": [torch.ones(1)]}, (torch.ones(1), 1)
            self.holder, self.calls_here, self.array = Holder(), 0, self.n.numpy()  # in one memory

        def state(self) -> Tensor:
            tensors = (self.n, self.nested["n"][0], self.pair[0], self.holder.n, type(self).of_class)
            return sum(t.sum() for t in tensors) + self.holder.calls + self.calls_here + type(self).held["n"] + type(self).calls

        def forward(self, x: Tensor) -> Tensor:
            change(self)
            return self.conv(x) * read(self)

    return Stateful


def network(kind: type[nn.Module], conv: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), kind(conv), nn.Conv2d(4, 4, 3)).eval()


def _set(name: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, value(module))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a method": lambda m: m.n.add_(1),
    "through data": lambda m: m.n.data.add_(1),
    "an item": lambda m: m.n.__setitem__(0, 3),
    "out": lambda m: torch.add(m.n, 1, out=m.n),
    "NumPy": lambda m: m.array.__iadd__(1),
    "in a dict": lambda m: m.nested["n"][0].add_(1),
    "in a tuple": lambda m: m.pair[0].mul_(2),
    "in an object": lambda m: m.holder.n.add_(1),
    "of a class": lambda m: type(m).of_class.add_(1),
    "an attribute": _set("n", lambda m: m.n + 1),
    "a counter": _set("calls_here", lambda m: m.calls_here + 1),
    "a counter in an object": lambda m: setattr(m.holder, "calls", m.holder.calls + 1),
    "a counter of a class": lambda m: setattr(type(m), "calls", type(m).calls + 1),
    "in a dict of a class": lambda m: type(m).held.__setitem__("n", type(m).held["n"] + 1),
}
USES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "transform": lambda model: se_fx.transform(model, min_channels=1, init="identity"),
    "in place": lambda model: (se_fx.apply_squeeze_excite(model, min_channels=1, init="identity"), model)[1],
    "inference": lambda model: se_fx.optimize_for_inference(model, example_inputs=X),
    "training": lambda model: se_fx.optimize_for_training(model, example_inputs=X),
    "plan": lambda model: (se_fx.plan(model, min_channels=1, example_inputs=X), model)[1],
}


@pytest.mark.parametrize("conv", [False, True], ids=["alone", "around a conv"])
@pytest.mark.parametrize("change", CHANGES)
def test_only_calls_change_state(change: str, conv: bool) -> None:
    for name, use in USES.items():
        made = []
        for do in (nn.Identity(), use):
            kind = a_class(CHANGES[change], lambda module: module.state())  # anew: a class has state, too
            model = network(kind, conv)
            before = model[1].state()
            result = do(model)
            assert torch.equal(model[1].state(), before), name
            made.append([result(X) for _ in range(3)])
        torch.testing.assert_close(made[1], made[0])


READS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda m: m.n,
    "arithmetic": lambda m: m.n + 1,
    "a number": lambda m: float(m.n),
    "a list": lambda m: m.n.tolist()[0],
    "a branch": lambda m: 2.0 if m.n > 3 else 1.0,
    "stacked": lambda m: torch.stack([m.n, m.pair[0]]).sum(),
    "in a dict": lambda m: m.nested["n"][0] * 2,
    "in a tuple": lambda m: m.pair[0].exp(),
    "in an object": lambda m: m.holder.n + 1,
    "of a class": lambda m: m.of_class + 1,
    "bytes": lambda m: m.n.untyped_storage().tolist()[2],
}


@pytest.mark.parametrize("write", [Tensor.fill_, lambda t, value: t.data.fill_(value)], ids=["in place", "through data"])
@pytest.mark.parametrize("read", READS)
def test_values_are_not_frozen(read: str, write: Callable[[Tensor, float], Any]) -> None:
    for name in ("transform", "in place"):
        outputs = []
        for do in (nn.Identity(), USES[name]):
            model = do(network(a_class(lambda _: None, READS[read]), conv=True))
            outputs.append([model(X)])
            inner = model.get_submodule("1")
            for tensor in (inner.n, inner.nested["n"][0], inner.pair[0], inner.holder.n, type(inner).of_class):
                write(tensor, 5.0)
            outputs[-1].append(model(X))
        torch.testing.assert_close(outputs[1], outputs[0])
        assert not torch.equal(*outputs[0])


def test_asking_for_shapes_is_no_reading() -> None:
    def read(module: Any) -> Any:
        n = module.n
        return torch.ones(n.shape, dtype=n.dtype, device=n.device) * n.numel() * len(n) if n.dim() == 1 else None

    result = se_fx.transform(network(a_class(lambda _: None, read), conv=True), min_channels=1)
    assert "1.conv" in {node.target for node in result.graph.nodes}  # looked into


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(next(m.parameters()), "grad", None),
        lambda m: next(m.parameters()).data.zero_(),
        lambda m: next(m.buffers()).fill_(1),
    ],
    ids=["a gradient", "data", "a buffer"],
)
def test_own_tensors_are_left_alone(change: Callable[[Any], Any]) -> None:
    model = network(a_class(change, lambda _: 1), conv=True)
    model[1].register_buffer("state_of_it", torch.zeros(1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    for use in USES.values():
        use(model)
        assert all(map(torch.equal, before, tensors))
        assert all(parameter.grad is not None for parameter in model[1].conv.parameters())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(float("nan")),
        torch.empty(0),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(1).expand(3),
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.ones(2, 2).t(),
        torch.ones(2, requires_grad=True),
    ],
)
def test_all_kinds_of_tensors(tensor: Tensor) -> None:
    module = nn.Identity()
    module.plain = tensor
    snapshot = Snapshot(module)
    assert not snapshot.changed()
    assert not snapshot.undo()
    network_of_it = network(a_class(lambda m: m.plain, lambda _: 1), conv=True)
    network_of_it[1].plain = tensor
    assert se_fx.transform(network_of_it, min_channels=1).get_submodule("1").plain is tensor


def test_other_memory_is_put_back() -> None:
    module = nn.Identity()
    module.moved, module.longer = torch.ones(1), torch.ones(1)
    snapshot = Snapshot(module)
    module.moved.data = module.moved + 1
    module.longer.resize_(4).fill_(2)
    assert snapshot.undo()
    assert module.moved.tolist() == module.longer.tolist() == [1]


def test_inference_tensors() -> None:
    module = nn.Identity()
    with torch.inference_mode():
        module.plain = torch.ones(2)
        snapshot = Snapshot(module)
        module.plain.add_(1)
    assert snapshot.undo()
    assert module.plain.tolist() == [1, 1]
