"""`optimize_for_training`: what it saves, and that it is the same model otherwise, whatever is done with it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
from recomputed import CHANNELS, Mobile, Residual, assert_alike, conv, kept_bytes, step
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import se_fx
from se_fx.cost import activation_bytes
from se_fx.measure.memory import peak_bytes
from se_fx.placement import PLACEMENTS
from se_fx.rewrites.training import matrices

X = torch.randn(3, CHANNELS, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def without_gates(name: str) -> nn.Module:
    model = timm.create_model(name)
    for module in list(model.modules()):
        if isinstance(getattr(module, "se", None), nn.Module):
            module.se = nn.Identity()
    return model


def resnet50(**options: Any) -> nn.Module:
    model = torchvision.models.resnet50()
    return se_fx.transform(model, **options) if options else model


#: With SE, without, and the most that may be kept of what is kept without.
ACCEPTED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], float]] = {
    "seresnet50": (lambda: timm.create_model("seresnet50"), resnet50, 1.01),
    "residual": (lambda: resnet50(placement="residual"), resnet50, 1.01),
    "conv": (lambda: resnet50(placement="conv"), resnet50, 1.02),
    "efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), lambda: without_gates("efficientnet_b0"), 0.92),
    "mobilenetv3_large_100": (
        lambda: timm.create_model("mobilenetv3_large_100"),
        lambda: without_gates("mobilenetv3_large_100"),
        0.97,
    ),
    "regnety_008": (lambda: timm.create_model("regnety_008"), lambda: without_gates("regnety_008"), 0.95),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_bytes_kept(name: str) -> None:
    make, plain, most = ACCEPTED[name]
    x = torch.zeros(2, 3, 160, 160)
    with torch.device("meta"):
        model, bare = make(), plain()
    before, without = activation_bytes(model, x), activation_bytes(bare, x)
    after = activation_bytes(se_fx.optimize_for_training(model), x)
    assert before is not None
    assert without is not None
    assert after is not None
    assert after <= most * without < before


def test_bytes_counted_are_those_kept_and_the_report_says_them() -> None:
    model = timm.create_model("test_efficientnet").train()
    x = torch.randn(2, 3, 64, 64)
    lean = se_fx.optimize_for_training(model, x)
    before, after = (kept_bytes(copy.deepcopy(each), x) for each in (model, lean))
    record: Any = se_fx.report(lean)
    assert isinstance(record, se_fx.Optimization)
    assert (record.kept, sum(one.kept_less for one in record.steps)) == (before, before - after)
    assert f"{before:,} bytes" in str(record)
    assert record.to_dict()["purpose"] == "training"
    assert str(record).startswith("EfficientNet, optimised for training: ")
    uncounted: Any = se_fx.report(se_fx.optimize_for_training(model))
    assert (uncounted.kept, {step.kept_less for step in uncounted.steps}) == (None, {None})


def test_it_is_the_same_model() -> None:
    model = Mobile().double()
    lean = se_fx.optimize_for_training(model)
    assert isinstance(lean, Mobile)
    assert lean is not model
    assert list(lean.state_dict()) == list(model.state_dict())
    assert [*map(id, lean.parameters()), *map(id, lean.buffers())] == [*map(id, model.parameters()), *map(id, model.buffers())]
    assert [name for name, _ in lean.named_modules()] == [name for name, _ in model.named_modules()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.conv.weight.detach().clone()
    lean(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.conv.weight, before)
    assert torch.equal(lean.eval()(X), model.eval()(X))


def checkpointed(reentrant: bool) -> Callable[[nn.Module, Tensor], Any]:
    return lambda model, x: checkpoint(model, x, use_reentrant=reentrant)


def offloaded(model: nn.Module, x: Tensor) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return model(x)


@pytest.mark.parametrize("call", [checkpointed(True), checkpointed(False), offloaded])
@pytest.mark.parametrize("make", [Residual, Mobile])
def test_within_checkpoints_and_hooks_of_others(make: Callable[[], nn.Module], call: Any) -> None:
    model = make().double()
    lean = copy.deepcopy(se_fx.optimize_for_training(model))
    assert_alike(step(lean, X, call), step(model, X, call))


def test_a_checkpoint_keeps_nothing_of_what_is_within() -> None:
    lean = se_fx.optimize_for_training(Mobile().double())
    inner: list[Any] = []
    lean.conv.register_forward_hook(lambda module, args, out: inner.append(weakref.ref(out)))
    out = checkpoint(lean, X.clone().requires_grad_(), use_reentrant=False)
    assert inner.pop()() is None
    out.sum().backward()
    gc.collect()
    assert [each() for each in inner] == [None]


def test_compiled_it_is_the_model() -> None:
    for make in (Residual, Mobile):
        model = make()
        lean = copy.deepcopy(se_fx.optimize_for_training(model))
        counts = [torch._dynamo.explain(each)(X.float()) for each in (model, lean)]
        assert counts[0].graph_break_count == counts[1].graph_break_count == 0
        assert counts[0].op_count == counts[1].op_count


def test_what_others_trace_is_the_model() -> None:
    model = Mobile().double().train()
    lean = se_fx.optimize_for_training(model)
    traced = torch.fx.symbolic_trace(lean)
    assert torch.equal(copy.deepcopy(traced)(X), copy.deepcopy(model)(X))
    scripted = torch.jit.trace(copy.deepcopy(lean), X, check_trace=False)
    assert torch.equal(scripted(X), copy.deepcopy(model)(X))
    exported = torch.export.export(copy.deepcopy(lean).eval(), (X,)).module()
    assert torch.equal(exported(X), copy.deepcopy(model).eval()(X))


def test_transforms_of_functions() -> None:
    model = Mobile(norm=lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False)).double().train()
    lean = se_fx.optimize_for_training(model)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        return grad(lambda parameters: functional_call(model, parameters, (X,)).square().sum())(dict(model.named_parameters()))

    for one, other in zip(gradients(lean).values(), gradients(model).values(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("whole", [False, True])
def test_copies(how: str, whole: bool) -> None:
    model = timm.create_model("test_resnet").double() if whole else None
    model = (
        Plain().double() if model is None else se_fx.transform(model, placement="residual", min_channels=1, latent_channels=2)
    )
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    lean = se_fx.optimize_for_training(model)
    copied = copy.deepcopy(lean) if how == "deepcopy" else pickle.loads(pickle.dumps(lean))
    expected, kept = step(copy.deepcopy(model), x), kept_bytes(copy.deepcopy(lean), x)
    assert kept_bytes(copy.deepcopy(copied), x) == kept < kept_bytes(copy.deepcopy(model), x)
    assert_alike(step(copied, x), expected)


class Plain(nn.Sequential):
    def __init__(self) -> None:
        block = se_fx.SqueezeExcite2d(CHANNELS, 2)
        super().__init__(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.SiLU(inplace=True), block, conv(3))


def test_other_verbs_work_as_on_the_model() -> None:
    model = se_fx.transform(torchvision.models.resnet18(), placement="residual", min_channels=64).double()
    lean, x = se_fx.optimize_for_training(model), torch.randn(2, 3, 64, 64).double()
    removed, original = se_fx.remove(lean), se_fx.remove(model)
    assert type(removed) is type(original)
    assert torch.equal(removed.eval()(x), original.eval()(x))
    for each in (model, lean):
        each.eval()
    profiles = [se_fx.profile_gates(each, [x], progress=False) for each in (model, lean)]
    assert all(site.samples == 2 for site in profiles[1].sites)
    for one, other in zip(*(profile.sites for profile in profiles), strict=True):
        assert torch.equal(one.channel_means, other.channel_means)
    assert str(se_fx.report(se_fx.optimize_for_inference(lean))) == str(se_fx.report(se_fx.optimize_for_inference(model)))
    again = se_fx.transform(lean, placement="residual", min_channels=64)
    assert isinstance(se_fx.report(again), se_fx.Report)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(x), model(x))
    twice = se_fx.optimize_for_training(lean)
    assert isinstance(se_fx.report(twice), se_fx.Optimization)


def test_what_is_done_to_it_later_holds() -> None:
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = timm.create_model("seresnet18").double().train()
    lean = se_fx.optimize_for_training(model)
    calls: list[int] = []
    handle = lean.layer1[0].se.register_forward_hook(lambda *_: calls.append(1))  # of code that is in the graph
    lean(x)
    assert calls == [1]
    handle.remove()
    lean.layer1[0].bn2.register_forward_hook(lambda module, args, out: out * 2)
    model.layer1[0].bn2.register_forward_hook(lambda module, args, out: out * 2)
    assert_alike(step(copy.deepcopy(lean), x), step(copy.deepcopy(model), x))
    for each in (lean, model):
        each.layer1[0].bn2._forward_hooks.clear()
        each.layer2[0].bn2.eval()
        each.layer3[0].act1 = nn.SiLU()
    assert_alike(step(copy.deepcopy(lean), x), step(copy.deepcopy(model), x))


def test_what_is_changed_before_backward_is_noticed() -> None:
    for change in ("norm.weight", "se.wide.weight"):
        model = Mobile().double()
        out = se_fx.optimize_for_training(model)(X)
        with torch.no_grad():
            model.get_parameter(change).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    out = se_fx.optimize_for_training(Mobile().double())(X)
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        out.sum().backward()


def test_nothing_is_kept_without_gradients() -> None:
    lean = se_fx.optimize_for_training(Mobile().double())
    with torch.no_grad():
        assert not lean(X).requires_grad
    with torch.inference_mode():
        assert lean(X).is_inference()


def test_peak_memory_falls() -> None:
    model = timm.create_model("efficientnet_b0").train()
    x = torch.randn(2, 3, 96, 96)
    peaks = [
        peak_bytes(lambda: each(x).sum().backward(), torch.device("cpu"))  # noqa: B023
        for each in (model, se_fx.optimize_for_training(model))
    ]
    assert peaks[1] < 0.9 * peaks[0]


def test_gradients_are_freed_as_ever() -> None:
    """What recipes hold is gone with the graph."""
    lean = se_fx.optimize_for_training(Mobile().double())
    inner: list[Any] = []
    lean.conv.register_forward_hook(lambda module, args, out: inner.append(weakref.ref(out)))
    gc.disable()
    try:
        lean(X).sum().backward()
        assert inner[0]() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------------------------- zoo
ZOO = [
    *("timm:seresnet18", "timm:seresnet50", "timm:legacy_seresnet18", "timm:seresnext26d_32x4d", "timm:ecaresnet26t"),
    *("timm:efficientnet_b0", "timm:tf_efficientnet_lite0", "timm:mobilenetv3_large_100", "timm:tf_mobilenetv3_small_100"),
    *("timm:regnety_008", "timm:mnasnet_small", "timm:semnasnet_075", "timm:ghostnet_100", "timm:rexnet_100"),
    *("timm:tinynet_e", "timm:fbnetv3_b", "timm:skresnet18", "timm:resnest14d", "timm:tf_efficientnetv2_b0"),
    *("regnet_y_400mf", "efficientnet_b0", "mobilenet_v3_large", "mobilenet_v3_small"),
    *(f"se_fx:{placement}" for placement in PLACEMENTS),
]


def zoo_model(name: str) -> nn.Module:
    home, _, rest = name.rpartition(":")
    if home == "timm":
        return timm.create_model(rest)
    if home == "se_fx":
        return se_fx.transform(torchvision.models.resnet18(), placement=rest, min_channels=64)
    return torchvision.models.get_model(name)


def both(make: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    torch.manual_seed(0)
    model = make().train()
    yield model
    yield copy.deepcopy(se_fx.optimize_for_training(model))


@pytest.mark.zoo
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ZOO)
def test_networks_of_others(name: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "LARGE", 0)  # so that small images take the ways of large ones
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=layout)
    model, lean = (each.to(memory_format=layout) for each in both(lambda: zoo_model(name)))
    exact, exact_lean = copy.deepcopy(model).double(), copy.deepcopy(lean).double()
    assert kept_bytes(copy.deepcopy(lean), x) <= kept_bytes(copy.deepcopy(model), x)
    truth = step(exact, x.double())
    assert_alike(step(exact_lean, x.double()), truth)
    found, expected = step(lean, x), step(model, x)
    assert torch.equal(found[0], expected[0])
    assert all(map(torch.equal, found[2], expected[2]))
    distances = [0.0, 0.0]
    for true, *ours in zip(truth[1], found[1], expected[1], strict=True):
        for place, each in enumerate(ours):
            if true is not None and each is not None:
                distances[place] += float((each - true).square().sum())
    assert distances[0] <= 4 * distances[1]  # of squares
