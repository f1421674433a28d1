"""Attention blocks by name, each started at the identity, on networks of others and on hand-written ones."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import unittest.mock
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from trained import settled

import se_fx
from se_fx.blocks import BLOCKS, IdentityStart, OfTimm
from se_fx.cost import measure

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BLOCK = pytest.mark.parametrize("block", BLOCKS)


class Network(nn.Module):
    """A stem, a residual unit, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.conv1, self.norm1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return self.head((x + y).relu().mean((2, 3)))


def transformed(model: nn.Module, block: str, **options) -> nn.Module:
    return se_fx.transform(model, block=block, min_channels=1, seed=0, **options)


def with_strength(model: nn.Module, strength: float) -> nn.Module:
    """`model`, with so much of each block."""
    starts = [module for module in model.modules() if isinstance(module, IdentityStart)]
    assert starts
    for start in starts:
        start.strength.data.fill_(strength)
    return model


def yolo() -> nn.Module:
    return pytest.importorskip("ultralytics").YOLO("yolov8n.yaml").model


def unet() -> nn.Module:
    return pytest.importorskip("segmentation_models_pytorch").Unet("resnet18", encoder_weights=None)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": torchvision.models.resnet50,
    "mobilenet_v3_large": torchvision.models.mobilenet_v3_large,
    "convnext_tiny": torchvision.models.convnext_tiny,
    "yolov8n": yolo,
    "unet": unet,
}


def assert_identity(model: nn.Module, block: str, x: Tensor, placement: str) -> None:
    gm = transformed(model, block, init="identity", placement=placement)
    for training in (False, True):
        outputs = []
        for each in (model, gm):  # which share the statistics that training changes, and doesn't use
            torch.manual_seed(0)
            outputs.append(torch.utils._pytree.tree_leaves(each.train(training)(x)))
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BLOCK
def test_every_block_can_start_at_the_identity(block: str, dtype: torch.dtype) -> None:
    assert_identity(settled(Network()).to(dtype), block, X.to(dtype), "conv")


@pytest.mark.zoo
@pytest.mark.parametrize("network", NETWORKS)
@BLOCK
def test_identity_on_networks_of_others(block: str, network: str) -> None:
    model, x = NETWORKS[network](), torch.randn(2, 3, 32, 32)
    placement = "norm" if network in ("yolov8n", "unet") else "residual"
    # On processors without instructions for it, bfloat16 takes most of the time.
    for dtype in (torch.float32, torch.bfloat16) if block in ("eca", "cbam", "simam") else (torch.float32,):
        assert_identity(copy.deepcopy(model).to(dtype), block, x.to(dtype), placement)


@BLOCK
def test_blocks_do_something_and_learn(block: str) -> None:
    model = settled(Network())
    gm = transformed(model, block, init="identity")
    gm(X).square().sum().backward()
    starts = [module for module in gm.modules() if isinstance(module, IdentityStart)]
    assert all(start.strength.grad is not None and start.strength.grad.abs() > 0 for start in starts)
    assert not torch.allclose(with_strength(gm, 1.0)(X), model(X))
    plain = transformed(model, block)
    assert not any(isinstance(module, IdentityStart) for module in plain.modules())


@BLOCK
def test_a_start_is_the_block_itself_at_full_strength(block: str) -> None:
    model = settled(Network().double())
    start, plain = (transformed(model, block, init=init) for init in ("identity", "default"))
    torch.testing.assert_close(with_strength(start, 1.0)(X.double()), plain(X.double()), rtol=1e-9, atol=1e-9)


def test_named_blocks_replay_in_a_fresh_process() -> None:
    plans = {block: se_fx.plan(Network(), block=block, init="identity", min_channels=1).to_dict() for block in BLOCKS}
    code = (
        "import json, sys, torch, se_fx\n"
        "from torch import nn\n"
        "for block, data in json.load(sys.stdin).items():\n"
        "    net = nn.Module()\n"
        "    class Net(nn.Sequential): pass\n"
        "    sites = [site for site in data['sites'] if site['name'] == 'stem.0']\n"
        "    net = Net(); net.stem = nn.Sequential(nn.Conv2d(3, 16, 3))\n"
        "    gm = se_fx.transform(net, se_fx.Plan.from_dict({**data, 'sites': sites}))\n"
        "    x = torch.randn(2, 3, 8, 8)\n"
        "    assert torch.equal(gm(x), net(x))\n"
        "    print(block, len(se_fx.Plan.of(gm)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], input=json.dumps(plans), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == [f"{block} 1" for block in BLOCKS]


@BLOCK
def test_costs_are_the_flop_counters(block: str) -> None:
    model = Network().eval()
    gm = transformed(model, block, init="identity")
    with FlopCounterMode(display=False) as counter:
        gm(X)
    assert 2 * measure(gm, X).total.macs == counter.get_total_flops()
    report = se_fx.report(gm, example_inputs=(X,))
    assert report.added.params == sum(p.numel() for p in gm.parameters()) - sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("strength", [0.0, 0.3])
@BLOCK
def test_optimised_blocks_agree(block: str, strength: float) -> None:
    model = settled(Network().double())
    gm = with_strength(transformed(model, block, init="identity", placement="residual"), strength).eval()
    fast = se_fx.optimize_for_inference(gm, example_inputs=(X.double(),))
    for x in (X, X[:1, :, :16], torch.randn(5, 3, 40, 24)):
        torch.testing.assert_close(fast(x.double()), gm(x.double()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", ["eca", "ese"])
def test_a_gates_share_goes_into_the_gate(block: str) -> None:
    gm = with_strength(transformed(settled(Network()), block, init="identity", placement="residual"), 0.3).eval()
    fast = se_fx.optimize_for_inference(gm, example_inputs=(X,))
    plain = transformed(settled(Network()), block, placement="residual").eval()
    expected = se_fx.optimize_for_inference(plain, example_inputs=(X,))
    maps = [sum(len(node.meta.get("size", ())) == 4 for node in each.graph.nodes) for each in (fast, expected)]
    assert maps[0] == maps[1]


class Each(nn.Module):
    """A network for each block, all in one, since what takes time is each start of a compiler or exporter."""

    def __init__(self, blocks: Iterable[str]) -> None:
        super().__init__()
        networks = {block: transformed(settled(Network()), block, init="identity", where="conv2") for block in blocks}
        self.networks = nn.ModuleDict({block: with_strength(network, 0.5) for block, network in networks.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {block: network(x) for block, network in self.networks.items()}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("blocks", "training", "backend"),
    [(BLOCKS, False, "aot_eager"), (BLOCKS, True, "aot_eager"), (("eca", "cbam", "simam"), False, "inductor")],
)
def test_blocks_compile_whole(blocks: Iterable[str], training: bool, backend: str) -> None:
    each = Each(blocks).train(training)
    torch.testing.assert_close(torch.compile(each, fullgraph=True, backend=backend)(X), each(X), rtol=1e-4, atol=1e-4)


@pytest.mark.integration
def test_blocks_export_to_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    each = Each(BLOCKS).eval()
    file = tmp_path / "networks.onnx"
    torch.onnx.export(each, (X,), str(file), dynamo=True)
    session = runtime.InferenceSession(str(file))
    found = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    outputs = dict(zip(BLOCKS, map(torch.from_numpy, found), strict=True))
    torch.testing.assert_close(outputs, each(X), rtol=1e-4, atol=1e-4)


def test_blocks_of_timm_say_what_to_install() -> None:
    with unittest.mock.patch.dict(sys.modules, {"timm": None, "timm.layers": None, "timm.layers.create_attn": None}):
        with pytest.raises(se_fx.SqueezeExciteError, match=r"timm makes this one.*pip install 'se_fx\[timm\]'"):
            se_fx.transform(Network(), block="eca", min_channels=1)
        transformed(Network(), "scse")
        transformed(Network(), "simam")


def test_an_old_timm_says_so() -> None:

    with pytest.raises(se_fx.SqueezeExciteError, match="this version of timm does not"):
        OfTimm("no such", "a paper")(8)


def test_a_checkpoint_of_a_start_is_none_of_the_plain_block() -> None:
    start, plain = (transformed(Network(), "ese", init=init) for init in ("identity", "default"))
    with pytest.raises(RuntimeError, match="strength"):
        plain.load_state_dict(start.state_dict())
    with pytest.raises(RuntimeError, match="strength"):
        start.load_state_dict(plain.state_dict())


def test_simam_of_one_value_is_a_half_open_gate() -> None:
    x = torch.randn(2, 4, 1, 1)
    torch.testing.assert_close(BLOCKS["simam"](4)(x), x * torch.tensor(0.5).sigmoid())


@pytest.mark.parametrize("block", ["scse", "simam"])
def test_own_blocks_take_single_images(block: str) -> None:
    module, x = BLOCKS[block](8), torch.randn(3, 8, 5, 6)
    torch.testing.assert_close(torch.stack([module(each) for each in x]), module(x))


def test_simam_of_large_halves_is_finite() -> None:
    x = 1000 * torch.randn(1, 2, 16, 16).half()
    wide = BLOCKS["simam"](2)(x.double())
    torch.testing.assert_close(BLOCKS["simam"](2)(x).double(), wide, rtol=2e-3, atol=1e-3)


def test_overrides_can_name_a_block_and_keep_the_start() -> None:
    gm = se_fx.transform(Network(), min_channels=1, init="identity", overrides={"conv2": {"block": "eca"}})
    kinds = {site.name: (site.block, site.init) for site in se_fx.Plan.of(gm).sites}
    assert kinds == {"stem.0": (None, "identity"), "conv1": (None, "identity"), "conv2": ("eca", "identity")}
    assert torch.equal(gm.eval()(X), gm(X))
