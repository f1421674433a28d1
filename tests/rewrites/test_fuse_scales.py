"""Scales are fused with the sum that reads them, or done in place, where nobody else sees the value before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from excited import NARROW, WIDE, assert_same, images, outcomes, settled
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

import se_fx
from se_fx import SqueezeExcite2d
from se_fx.rewrites.products import scaled, scaled_sum


class Scaled(nn.Module):
    """Two convs, a block on the first, and what is done with the scaled value z, the plain one y and the other x."""

    def __init__(self, ending: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.other, self.se = nn.Conv2d(NARROW, WIDE, 1), nn.Conv2d(NARROW, WIDE, 1), SqueezeExcite2d(WIDE, 4)
        self.ending = ending

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.ending(self.se(y), y, self.other(x))


def called(model: nn.Module) -> list[object]:
    return [node.target for node in model.graph.nodes if node.op in ("call_function", "call_method")]


def fused(model: nn.Module) -> tuple[fx.GraphModule, list[str]]:
    """With this rewrite alone, and what it says it did."""
    fast = se_fx.optimize_for_inference(model, rewrites=["fuse_scales"])
    (step,) = se_fx.report(fast).steps
    return fast, [change.detail for change in step.changes]


SUM, IN_PLACE, STAYS = "with the sum that reads it", "in place", "others read the value, or may"
ENDINGS = {
    "sum": (lambda z, y, x: z + x, SUM),
    "sum, the other way round": (lambda z, y, x: x + z, SUM),
    "sum in place": (lambda z, y, x: z.add_(x), SUM),
    "sum with itself": (lambda z, y, x: z + z, IN_PLACE),
    "sum in place into the other": (lambda z, y, x: x.add_(z), SUM),
    "sum in place into the other, which is read after": (lambda z, y, x: x.add_(z) + x, IN_PLACE),
    "weighted sum": (lambda z, y, x: torch.add(z, x, alpha=2), IN_PLACE),
    "sum with a number": (lambda z, y, x: z + 1, IN_PLACE),
    "sum of other shape": (lambda z, y, x: z + x.mean((2, 3), keepdim=True), IN_PLACE),
    "read twice": (lambda z, y, x: torch.cat([z + x, z], 1), IN_PLACE),
    "other function": (lambda z, y, x: z.relu() + x, IN_PLACE),
    "plain value read after": (lambda z, y, x: torch.cat([z, y], 1), STAYS),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_what_reads_the_scaled_value_decides(name: str) -> None:
    ending, done = ENDINGS[name]
    model = settled(Scaled(ending))
    fast, details = fused(model)
    assert details == [done]
    assert outcomes(fast, "fuse_scales") == [done != STAYS]
    assert (scaled_sum in called(fast)) == (done == SUM)
    assert (scaled in called(fast)) == (done == IN_PLACE)
    x = images()
    kept = x.clone()
    assert_same(fast(x), model(kept))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("before", [nn.Identity(), nn.Conv2d(NARROW, NARROW, 1)], ids=["input", "conv's"])
def test_the_models_own_input_is_never_scaled_in_place(before: nn.Module) -> None:
    model = settled(nn.Sequential(before, SqueezeExcite2d(NARROW, 2), nn.Conv2d(NARROW, WIDE, 1)))
    fast, details = fused(model)
    assert (IN_PLACE in details) == (scaled in called(fast)) == isinstance(before, nn.Conv2d)
    x = images()
    kept = x.clone()
    assert_same(fast(x), model(kept))
    assert torch.equal(x, kept)


def test_a_sum_is_one_operator_in_eager_mode_and_two_to_compilers() -> None:
    model = settled(Scaled(lambda z, y, x: z + x))
    fast, _ = fused(model)
    ran: list[str] = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    x = images()
    with torch.no_grad(), Operators():
        fast(x)
    assert ran.count("addcmul") == 1
    exported = torch.export.export(fast, (x,))
    called_there = [str(node.target) for node in exported.graph.nodes]
    assert "aten.addcmul.default" not in called_there
    assert called_there[-2] == "aten.add.Tensor"
    assert_same(exported.module()(x), model(x))


@pytest.mark.integration
def test_a_convolution_takes_the_sum_of_its_map_and_a_scaled_one() -> None:
    model = Scaled(lambda z, y, x: torch.relu(z + x)).eval()
    fast, details = fused(model)
    assert details == [SUM]
    x = torch.randn(2, NARROW, 7, 5).contiguous(memory_format=torch.channels_last)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        found, code = run_and_get_code(torch.compile(fast, fullgraph=True), x)
    torch.compiler.reset()
    torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-5)
    calls = [line for line in "".join(code).splitlines() if "_convolution_pointwise_.binary(" in line]
    assert len(calls) == 1
    assert "'add'" in calls[0]
    assert "'relu'" in calls[0]
