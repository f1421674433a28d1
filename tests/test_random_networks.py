"""Random networks, random options: identity, keys, idempotence, removal, replay and counting hold for all of them."""

from __future__ import annotations

import copy
import json
import pickle

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import se_fx
from se_fx.placement import PLACEMENTS

CHANNELS = 4
STEPS = {
    "conv": lambda net, x: net.convs[0](x),
    "shared conv": lambda net, x: net.convs[0](net.convs[0](x)),
    "conv, norm, relu": lambda net, x: F.relu_(net.norm(net.convs[1](x))),
    "residual": lambda net, x: x + net.convs[2](torch.relu(net.convs[1](x))),
    "residual, in place": lambda net, x: F.relu_(net.convs[2](F.relu_(net.norm(net.convs[1](x)))).add_(x)),
    "pre-activation": lambda net, x: net.convs[2](F.relu(net.convs[1](F.relu(x)))).mul(0.5) + x,
    "pre-activation, in place": lambda net, x: net.convs[2](F.relu(net.convs[1](x.relu_()))) + x,
    "added to in place": lambda net, x: x.add_(net.convs[1](net.convs[2](x).relu())),
    "projected": lambda net, x: F.relu(net.convs[0](x) + net.convs[2](F.relu(net.convs[1](x)))),
    "branches": lambda net, x: net.merge(torch.cat([net.convs[1](x), x], 1)),
    "gate": lambda net, x: x * torch.sigmoid(net.convs[2](x.mean((2, 3), keepdim=True))),
    "in place": lambda net, x: net.convs[1](x).mul_(2).add_(x),
    "dropout": lambda net, x: F.dropout(x, 0.5, net.training),
    "train only": lambda net, x: net.convs[2](x) if net.training else x,
    "noise": lambda net, x: x + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype) if net.training else x,
    "value branch": lambda net, x: net.inner(x),
    "hooked": lambda net, x: net.hooked(x),
    "keyword": lambda net, x: net.hooked(input=x),
    "pool": lambda net, x: F.avg_pool2d(x, 2, ceil_mode=True),
}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


class Network(nn.Module):
    def __init__(self, steps: list[str], output: str) -> None:
        super().__init__()
        self.steps, self.output = steps, output
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 1, groups=groups) for groups in (1, 2, 4))
        self.norm, self.merge, self.inner = nn.BatchNorm2d(CHANNELS), nn.Conv2d(2 * CHANNELS, CHANNELS, 1), Branches()
        self.hooked = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU())
        self.hooked.register_forward_hook(double)

    def forward(self, x: Tensor):
        x = self.stem(x)
        for step in self.steps:
            x = STEPS[step](self, x)
        return {"tensor": x, "dict": {"out": x}, "tuple": (x, None)}[self.output] if self.output != "tensor" else x


def double(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output * 2


def leaves(output) -> list:
    return torch.utils._pytree.tree_leaves(output)


def run(model: nn.Module, x: Tensor, training: bool, buffers: dict[str, Tensor]) -> list:
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
    torch.manual_seed(1)
    with torch.no_grad():
        return leaves(model.train(training)(x))


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) if isinstance(p, Tensor) else p is q for p, q in zip(a, b, strict=True))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=6),
    output=st.sampled_from(["tensor", "dict", "tuple"]),
    placement=st.sampled_from(sorted(PLACEMENTS)),
    min_channels=st.integers(1, 5),
    latent_channels=st.sampled_from([1, 3, 0.5]),
    bias=st.booleans(),
    gate=st.sampled_from(["sigmoid", "hardsigmoid"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    batch=st.sampled_from([0, 1, 3]),
    channels_last=st.booleans(),
)
def test_promises_hold(
    steps, output, placement, min_channels, latent_channels, bias, gate, dtype, batch, channels_last
) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = Network(steps, output).to(dtype=dtype, memory_format=layout)
    options = {"min_channels": min_channels, "latent_channels": latent_channels, "bias": bias, "gate": gate}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        result = se_fx.transform(model, init="identity", **options, placement=placement)
    except se_fx.SqueezeExciteError as error:
        assert "no such place" in str(error) and placement != "conv"  # noqa: PT017, PT018
        return
    options["placement"] = placement

    new_state = result.state_dict(keep_vars=True)
    assert all(new_state[key] is value for key, value in model.state_dict(keep_vars=True).items())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all("squeeze_excite" in key.split(".") for key in new_state.keys() - state.keys())
    twice = se_fx.transform(result, init="identity", **options)
    assert twice.state_dict().keys() == new_state.keys()
    removed = se_fx.remove(result)
    assert type(removed) is Network
    plan = se_fx.Plan.from_dict(json.loads(json.dumps(se_fx.plan(model, init="identity", **options).to_dict())))
    replayed = se_fx.transform(model, plan)

    x = torch.randn(batch, 3, 6, 6, dtype=dtype).to(memory_format=layout)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    copies = [copy.deepcopy(result), pickle.loads(pickle.dumps(result))]
    for training in (True, False) if batch > 1 else (False,):  # norms need more than one value
        expected = run(model, x, training, buffers)
        for each in (result, twice, removed, replayed, *copies):
            assert same(run(each, x, training, buffers), expected)

    if dtype == torch.float64:  # where sums in another order agree to 12 digits
        for each in (result, se_fx.transform(model, **options)):
            expected = run(each, x, False, buffers)
            found = run(se_fx.optimize_for_inference(each), x, False, {})
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)

    real = torch.randn(2, 3, 6, 6, dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        run(result, real, False, buffers)
    report = se_fx.report(result, real)
    assert 2 * (report.base.macs + report.added.macs) == counter.get_total_flops()
