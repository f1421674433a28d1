"""Optimised models: what they keep, what they say was done, and that they compile and export."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from trained import applied, assert_close, settled

import se_fx
from se_fx import SqueezeExciteError
from se_fx.cost import NO_COST, measure
from se_fx.rewrites import Change, Optimization, Step
from se_fx.rewrites.products import VectorLinear


def small() -> nn.Module:
    """Small, with a bottleneck and blocks."""
    model = timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck, (1, 1, 1, 1), num_classes=10, stem_width=16, block_args={"attn_layer": "se"}
    )
    return settled(model)


def test_copies_and_pickles() -> None:
    fast, x = se_fx.optimize_for_inference(small()), torch.randn(2, 3, 32, 32)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert torch.equal(copied(x), fast(x))
        assert se_fx.report(copied) == se_fx.report(fast)
        with pytest.raises(SqueezeExciteError, match=r"can't be trained: call \.eval\(\)"):
            copied.train()(x)
        assert torch.equal(copied.eval()(x), fast(x))
    again = se_fx.optimize_for_inference(fast)
    assert torch.equal(again(x), fast(x))


def test_modules_of_several_names() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Sequential(nn.Linear(2, 2))))
            self.first, self.second = small(), nn.Sequential(nn.Conv2d(10, 4, 1), nn.BatchNorm2d(4))
            self.again, self.holder = self.second, nn.ModuleDict({"same": self.second, "conv": self.second[0]})
            self.table = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)[..., None, None]
            return self.again(y) + self.holder["conv"](y) + self.table[:, None, None]

    model, x = settled(Named()), torch.randn(2, 3, 32, 32)
    fast = se_fx.optimize_for_inference(model)
    assert_close(fast(x), model(x))
    keys = fast.state_dict().keys()
    assert {"table", "second.0.weight"} <= keys
    assert not any("unused" in key or "running" in key for key in keys)
    assert not any("unused" in name for name, _ in fast.named_modules())


def tiny() -> nn.Module:
    """One bottleneck with a block, so that compilers are done soon."""
    stem = nn.Sequential(nn.Conv2d(3, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    return settled(nn.Sequential(stem, timm.models.resnet.Bottleneck(64, 16, attn_layer="se"), nn.Flatten()))


def test_places_within_code_that_is_no_graph_have_the_models_names() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() > 0 else -x

    model, x = Branches().eval(), torch.rand(2, 3, 16, 16)
    fast = se_fx.optimize_for_inference(model, x)
    places = {step.rewrite: [change.place for change in step.changes] for step in se_fx.report(fast).steps}
    assert places["fold_norms"] == ["net.1.bn1", "net.1.bn2", "net.1.bn3"]
    assert places["hoist_squeezes"] == ["net.1.conv3_folded"]
    assert "the model itself: " in str(se_fx.report(fast))
    (folded,) = se_fx.report(se_fx.optimize_for_inference(tiny(), rewrites=["fold_norms"])).steps
    assert [change.place for change in folded.changes] == ["0.1", "1.bn1", "1.bn2", "1.bn3"]
    assert_close(fast(x), model(x))
    assert torch.equal(fast(-x), x)


def test_constants_that_code_makes_are_kept() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + torch.arange(3.0)[:, None, None])

    model, x = Shifted().eval(), torch.rand(2, 3, 16, 16)
    gm = se_fx.transform(model, min_channels=64).eval()
    for each in (model, gm):
        assert_close(se_fx.optimize_for_inference(each)(x), each(x))


def test_what_does_nothing_in_eval_mode_is_taken_out_but_hooks_and_training_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Identity(), nn.Dropout(), nn.Identity(), nn.Dropout(1.0)).eval()
    model[3].register_forward_hook(lambda module, args, output: output + 1)
    model[4].train()
    fast = se_fx.optimize_for_inference(model)
    assert [node.target for node in fast.graph.nodes if node.op == "call_module"] == ["0", "3", "4"]
    assert torch.equal(fast(torch.rand(1, 3, 4, 4)), torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize("values", [lambda x: x[x > 0].mean(), lambda x: x.sum().item()], ids=["shapes", "numbers"])
def test_graphs_that_need_values_are_counted_by_running_them(values) -> None:
    class NeedsValues(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * values(x)

    model, x = NeedsValues().eval(), torch.rand(2, 3, 16, 16)
    fast = se_fx.optimize_for_inference(model, x)
    report = se_fx.report(fast)
    assert report.opaque == ()
    assert report.before - sum((step.saved for step in report.steps), se_fx.Cost()) == measure(fast, x).total
    assert_close(fast(x), model(x))


def test_a_root_whose_class_overrides_methods_keeps_what_they_use() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    model, x = settled(Frozen()), torch.rand(1, 3, 4, 4)
    fast = se_fx.optimize_for_inference(model)
    assert applied(fast)["fold_norms"] == 1
    assert_close(fast.eval()(x), model(x))


def test_gradients_of_inputs() -> None:
    model = small()
    fast = se_fx.optimize_for_inference(model)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (found,) = torch.autograd.grad(fast(x).square().sum(), x)
    assert_close(found, expected)


def test_what_was_done_is_reported() -> None:
    model, x = small(), torch.randn(2, 3, 64, 64)
    fast = se_fx.optimize_for_inference(model, x)
    report = se_fx.report(fast)
    before, after = report.before, measure(fast, x).total
    saved = sum((step.saved for step in report.steps), se_fx.Cost())
    assert before - saved == after
    hoisted = next(step for step in report.steps if step.rewrite == "hoist_squeezes")
    # Each of the 4 squeezes reads C/4 channels instead of C; the first matrices shrink from C x C/16 to C/4 x C/16.
    widths = [256, 512, 1024, 2048]
    assert hoisted.saved.macs == 2 * sum(width // 16 * (width - width // 4) for width in widths)
    squeezed = sum(2 * (width - width // 4) * size**2 for width, size in zip(widths, (16, 8, 4, 2), strict=True))
    assert hoisted.saved.flops == 2 * hoisted.saved.macs + squeezed
    assert json.loads(json.dumps(report.to_dict()))["model"] == "ResNet"
    text = str(report)
    for part in ("layer4.0.conv3", "averages 512 channels instead of 2048", "bytes saved", "fold_norms"):
        assert part in text
    made = [module for module in fast.modules() if isinstance(module, VectorLinear)]
    assert made
    assert not any(parameter.requires_grad for module in made for parameter in module.parameters())
    uncounted = se_fx.report(se_fx.optimize_for_inference(model))
    assert "bytes saved" not in str(uncounted)
    assert (uncounted.before, {step.saved for step in uncounted.steps}) == (None, {None})


def test_reports_as_text() -> None:
    changes = tuple(Change(f"conv{i}", i % 2 == 0, f"for reason {i}") for i in range(11))
    steps = (Step("fold_norms", changes), Step("fuse_scales", ()))
    counted = (
        dataclasses.replace(steps[0], saved=se_fx.Cost(10, 2000, 4000, -5)),
        dataclasses.replace(steps[1], saved=NO_COST),
    )
    lean = tuple(dataclasses.replace(step, kept_less=less) for step, less in zip(steps, (2000, 0), strict=True))
    opaque = tuple((name, "branches on a value") for name in ("", "a", "b", "c", "d", "e"))
    assert str(Optimization("Net", steps, opaque=opaque)) == TEXT
    assert str(Optimization("Net", steps, opaque=opaque[1:5])).endswith("  d: branches on a value")
    table = str(Optimization("Net", counted, se_fx.Cost(100, 20_000, 0, 50))).split("\n\n")[1]
    assert table == COUNTED
    report = Optimization("Net", lean, purpose="training", kept=10_000)
    assert str(report).startswith("Net, optimised for training: rewritten in 6 places.\n\n" + LEAN)
    assert str(Optimization("Net", steps[1:])).endswith("fuse_scales       0           0")


TEXT = """\
Net, optimised for inference: rewritten in 6 places.

rewrite        done    not done
-----------  ------  ----------
fold_norms        6           5
fuse_scales       0           0

Done (all of it is in `steps`):
  fold_norms: conv0: for reason 0
  fold_norms: conv2: for reason 2
  fold_norms: conv4: for reason 4
  fold_norms: conv6: for reason 6
  fold_norms: and 2 more

Not done (all of it is in `steps`):
  fold_norms: conv1: for reason 1
  fold_norms: conv3: for reason 3
  fold_norms: conv5: for reason 5
  fold_norms: conv7: for reason 7
  fold_norms: and 1 more

Run their own code, and were not looked into:
  the model itself: branches on a value
  a: branches on a value
  b: branches on a value
  c: branches on a value
  and 2 more"""

COUNTED = """\
rewrite                done    not done    parameters saved    MACs saved    FLOPs saved    bytes saved
-------------------  ------  ----------  ------------------  ------------  -------------  -------------
fold_norms                6           5                  10         2,000          4,000             -5
fuse_scales               0           0                   0             0              0              0
all, of the model's                                  10.00%        10.00%                       -10.00%"""

LEAN = """\
rewrite                 done    not done    bytes kept less
--------------------  ------  ----------  -----------------
fold_norms                 6           5              2,000
fuse_scales                0           0                  0
all, of 10,000 bytes                                 20.00%"""


# ------------------------------------------------------------------------------------------------ compiled and exported
@pytest.mark.integration
def test_compiled_as_one_graph_with_any_batch() -> None:
    model = tiny()
    fast = se_fx.optimize_for_inference(model)
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for batch in (2, 3, 16, 1, 17):
            x = torch.randn(batch, 3, 32, 32)
            assert_close(compiled(x), model(x))


@pytest.mark.integration
def test_compiled_by_inductor_with_freezing() -> None:
    model = tiny()
    fast = se_fx.optimize_for_inference(model)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        x = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        assert_close(torch.compile(fast, fullgraph=True)(x), model(x))
    torch.compiler.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported(dynamic: bool, tmp_path: Path) -> None:
    import onnxruntime

    model, x = tiny(), torch.randn(2, 3, 32, 32)
    fast = se_fx.optimize_for_inference(model)
    assert applied(fast)["hoist_squeezes"] == 1
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    exported = torch.export.export(fast, (x,), dynamic_shapes=shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(fast, (x,), tmp_path / "fast.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "fast.onnx")
    for batch in (1, 2, 5) if dynamic else (2,):
        x = torch.randn(batch, 3, 32, 32)
        assert_close(exported.module()(x), model(x))
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.integration
def test_packaged_ahead_of_time(tmp_path: Path) -> None:
    model, x = tiny(), torch.randn(1, 3, 32, 32)
    exported = torch.export.export(se_fx.optimize_for_inference(model), (x,))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "fast.pt2"))
    assert_close(torch._inductor.aoti_load_package(path)(x), model(x))
