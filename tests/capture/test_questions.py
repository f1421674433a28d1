"""Code asks questions that graphs can't answer, and has side effects: what runs gives the code's own answers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from two_convs import Model, X, assert_same, outputs, rewritten

import se_fx


class DropPath(Model):
    """Stochastic depth in the way of EfficientNet-Lite0: a random tensor of a traced size."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            x = x * torch.floor(0.5 + torch.rand([x.size(0), 1, 1, 1], dtype=x.dtype, device=x.device))
        return self.second(x) + torch.randn(1)


class ChecksTypes(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        xs = [x] if isinstance(x, Tensor) else x
        assert torch.is_tensor(x)
        assert not isinstance(x, (list, tuple, dict))
        return self.second(torch.cat(xs))


class InPlace(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        F.relu_(y)
        y.mul_(2)
        y[:, 0] = 0
        return self.second(y)


@pytest.mark.parametrize("kind", [DropPath, ChecksTypes, InPlace])
def test_traced_whole_and_exact(kind: type[nn.Module]) -> None:
    model = kind()
    result = rewritten(model)
    assert isinstance(result, fx.GraphModule)
    assert_same(model, result, X)
    assert_same(model, result, torch.randn(5, 3, 6, 9))


# ------------------------------------------------------------------------------ one conv, and a forward with a question
def run_body(body, *args, sites: int = 1, calls: int = 2, **kwargs) -> nn.Module:
    """Check a model whose forward is `body(self, x)` with one conv, in both modes, called repeatedly; returns the result."""

    class OneConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.register_buffer("buf", torch.full((1,), 2.0))

        forward = body

    model = OneConv()
    result = rewritten(model, sites)
    for training in (False, True):
        model.train(training), result.train(training)
        for _ in range(calls):
            theirs, ours = copy.deepcopy(args), copy.deepcopy(args)
            expected = outputs(model, *theirs, **kwargs)
            actual = outputs(result, *ours, **kwargs)
            assert torch.equal(actual, expected)
            assert all(not isinstance(a, Tensor) or torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    return result


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


def accumulates(self, x):
    total = torch.zeros(1, 3, 1, 1)
    for _ in range(2):
        total += self.conv(x).mean((0, 2, 3), keepdim=True)
    return total


def fills_a_constant(self, x):
    out = torch.zeros(2, 3, 8, 8)
    out[:, 1] = self.conv(x)[:, 1]
    out.add_(1)
    return out


def augments_an_alias(self, x):
    y = self.conv(x)
    alias = y
    y += 1
    view = y[:, :1]
    view *= 5
    x -= 1
    return alias


def sums_parameters(self, x):
    return self.conv(x) * self.conv._parameters["weight"].square().sum() * dict(self.named_buffers())["buf"]


def unpacks_lists(self, x):
    if isinstance(x, (list, tuple)):
        x = x[0]
    return self.conv(x)


def checks_sizes(self, x):
    size = x.shape[-2:]
    if not isinstance(size, (tuple, list)):
        size = (size, size)
    return F.interpolate(self.conv(x), size=size)


def asks_for_attributes(self, x):
    if hasattr(x, "tensors"):
        x = x.tensors
    return self.conv(x)


def looks_up_a_dtype(self, x):
    y = self.conv(x)
    return y * {3: 2.0}.get(x.shape[1], 1.0) if x.dtype in {torch.float32} else y


def sets_data(self, x):
    x.data = x.data.clamp(0)
    return self.conv(x)


def catches_errors(self, x):
    y = self.conv(x)
    try:
        if x.sum() > -1e9:
            y = y * 2
    except Exception:
        pass
    return y


def asks_for_the_grad_mode(self, x):
    return self.conv(x) * (1 if torch.is_grad_enabled() else 2)


def seeds(self, x):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return self.conv(x) + torch.randn(1, 3, 1, 1)


BODIES = [
    lambda self, x: Reverse.apply(self.conv(x)),
    lambda self, x: torch.as_tensor(self.conv(x)) * 2,
    accumulates, fills_a_constant, augments_an_alias, sums_parameters, unpacks_lists, checks_sizes, asks_for_attributes,
    looks_up_a_dtype, sets_data, catches_errors, asks_for_the_grad_mode, seeds,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_questions_and_side_effects_of_code(body) -> None:
    run_body(body, X)


def test_backward_passes_of_custom_functions_are_kept() -> None:
    result = run_body(BODIES[0], X)
    x = X.clone().requires_grad_()
    result(x).sum().backward()
    ones = torch.ones(2, 3, 8, 8)
    expected = torch.nn.grad.conv2d_input(x.shape, result.conv.weight, -ones, padding=1)
    torch.testing.assert_close(x.grad, expected)


def test_lists_where_lists_are_taken() -> None:
    run_body(unpacks_lists, [X])


def test_parameters_are_read_at_each_call() -> None:
    result = run_body(sums_parameters, X)
    before = result(X)
    with torch.no_grad():
        result.buf.mul_(3)
    assert torch.equal(result(X), before * 3)


def mask_or_none(self, x, mask):
    y = self.conv(x)
    return y if mask is None else y * mask


def one_or_the_other(self, x, a=None, b=None):
    y = self.conv(x)
    return y + b if (a is None and b is not None) else y


def keywords(self, x, **options):
    y = self.conv(x)
    return y * options["mask"] if options.get("mask") is not None else y


@pytest.mark.parametrize("mask", [None, torch.tensor(2.0)])
def test_none_and_optional_arguments(mask) -> None:
    run_body(mask_or_none, X, mask)
    run_body(one_or_the_other, X, b=mask)
    run_body(one_or_the_other, X, a=mask, b=mask)
    run_body(keywords, X, mask=mask)
    run_body(keywords, X)


# ------------------------------------------------------------------------------------------------------- all parameters
def test_code_that_goes_through_all_parameters_finds_the_blocks_among_them() -> None:
    class Penalised(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + sum(p.square().sum() for p in self.parameters())

    result = rewritten(Penalised())  # a limit: else optimizers wouldn't find them either
    penalty = sum(p.square().sum() for p in result.parameters())
    assert torch.equal(result(X), result.second(result.first(X)) + penalty)
    assert any("squeeze_excite" in name for name, p in result.named_parameters() if p.any())


class Skip(nn.Module):
    """A part of some networks that is left out, or is at times."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always = always

    def forward(self, x: Tensor) -> Tensor | None:
        return None if self.always or not self.training else 2 * x


@pytest.mark.parametrize("always", [False, True])
def test_a_part_that_may_return_none(always: bool) -> None:
    """`y is None` asks nobody."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.skip = nn.Conv2d(3, 3, 1), Skip(always)

        def forward(self, x: Tensor) -> Tensor:
            y, z = self.conv(x), self.skip(x)
            return y if z is None else y + z

    model, x = Sums(), torch.randn(2, 3, 5, 5)
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    assert len(se_fx.blocks_of(result)) == 1
    for training in (True, False):
        assert torch.equal(result.train(training)(x), model.train(training)(x))
    fast = se_fx.optimize_for_inference(result.eval())
    assert torch.allclose(fast(x), model(x), atol=1e-6)


def test_code_of_no_file() -> None:
    """A class that was made by `exec`, as notebooks and pages make them, is of no module."""
    names = {"nn": nn, "__name__": None}
    exec("class Double(nn.Module):\n    def forward(self, x):\n        return 2 * x", names)
    names["Double"].__module__ = "nowhere"
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), names["Double"]()).eval(), torch.randn(2, 3, 5, 5)
    result = se_fx.transform(model, min_channels=1, latent_channels=2, init="identity")
    assert torch.equal(result(x), model(x))
    assert "" in se_fx.report(result).regions
