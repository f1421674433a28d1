"""All of it on a real GPU: `pytest -m cuda`. Where there is none, one line says so. The device: `SE_FX_DEVICE`, else "cuda"."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from trained import settled

import se_fx
from se_fx.blocks import BLOCKS
from se_fx.measure.memory import peak_bytes
from se_fx.placement import PLACEMENTS

timm = pytest.importorskip("timm")
DEVICE = torch.device(os.environ.get("SE_FX_DEVICE", "cuda"))
IS_THERE = DEVICE.type == "cpu" or (DEVICE.type == "cuda" and torch.cuda.is_available())
if not IS_THERE:
    pytest.skip(f"there is no device {str(DEVICE)!r} here", allow_module_level=True)
pytestmark = pytest.mark.cuda

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "timm's seresnet18": lambda: timm.create_model("seresnet18"),
}
EVERY_NETWORK = pytest.mark.parametrize("name", NETWORKS)
EXACT = pytest.mark.usefixtures("exact")


@pytest.fixture
def exact() -> Iterator[None]:
    """Float32 is float32, and kernels are the same each time."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(precision)


def images(batch: int = 4, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def on_both(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """A network with blocks, drawn from one seed: made on the CPU, and made on the device."""
    torch.manual_seed(0)
    here = settled(NETWORKS[name]())
    there = copy.deepcopy(here).to(DEVICE)
    options = options or {"latent_channels": 8}
    return tuple(se_fx.transform(each, min_channels=64, seed=1, **options).eval() for each in (here, there))


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> None:
    """Of the largest value: other kernels, in another order."""
    assert found.device.type == DEVICE.type
    assert float((found.detach().cpu() - expected.detach()).abs().max()) <= tolerance * float(expected.abs().max())


# ----------------------------------------------------------------------------------------------------------------- outputs
@EXACT
@EVERY_NETWORK
def test_outputs_are_the_cpus(name: str) -> None:
    here, there = on_both(name)
    assert {parameter.device.type for parameter in there.parameters()} == {DEVICE.type}
    state = there.state_dict()
    assert all(torch.equal(value, state[key].cpu()) for key, value in here.state_dict().items())  # of one seed
    assert_near(there(images().to(DEVICE)), here(images()))


@EXACT
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_identity_is_bitwise_in_both_modes(placement: str) -> None:
    model, x = torchvision.models.resnet18().to(DEVICE), images().to(DEVICE)
    gm = se_fx.transform(model, placement=placement, min_channels=64, init="identity")
    for training in (False, True):
        assert torch.equal(gm.train(training)(x), model.train(training)(x))


@EXACT
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_by_name(block: str) -> None:
    here, there = on_both("resnet18", block=block)
    there.load_state_dict(here.state_dict())
    assert_near(there(images().to(DEVICE)), here(images()))


def test_costs_are_the_cpus() -> None:
    here, there = (
        se_fx.report(each, images().to(device)) for each, device in zip(on_both("resnet18"), ("cpu", DEVICE), strict=True)
    )
    assert (there.base, there.added, there.activation_bytes) == (here.base, here.added, here.activation_bytes)


# ---------------------------------------------------------------------------------------------------------------- training
def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), torch.arange(len(x), device=x.device))
    loss.backward()
    optimizer.step()
    return loss.item()


@EXACT
@EVERY_NETWORK
def test_training_is_the_cpus(name: str) -> None:
    losses = []
    for model, device in zip(on_both(name), ("cpu", DEVICE), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        x = images(8).to(device)
        losses.append([step(model.train(), x, optimizer) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_blocks_join_an_optimizer_in_mid_training() -> None:
    model, x = torchvision.models.resnet18().to(DEVICE), images(8).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    first = step(model, x, optimizer)
    se_fx.apply_squeeze_excite(model, 8, 64, optimizer, init="identity")
    assert min(step(model, x, optimizer) for _ in range(8)) < first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = se_fx.transform(torchvision.models.resnet18().to(DEVICE), placement="residual", min_channels=64)
    lean = se_fx.optimize_for_training(model.train())
    optimizer, scaler = torch.optim.SGD(lean.parameters(), 0.02), torch.amp.GradScaler(DEVICE.type)
    x, target, losses = images(8).to(DEVICE), torch.arange(8, device=DEVICE), []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=dtype):
            loss = F.cross_entropy(lean(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@EXACT
def test_optimised_training_is_the_same_and_takes_less_memory() -> None:
    model = timm.create_model("seresnet50").to(DEVICE).train()
    x = images(8, 96).to(DEVICE)
    peaks, outputs = [], []
    for each in (copy.deepcopy(model), se_fx.optimize_for_training(copy.deepcopy(model))):
        outputs.append(each(x).detach())

        def once(each: nn.Module = each) -> None:
            each(x).square().mean().backward()

        once()  # workspaces
        peaks.append(peak_bytes(once, DEVICE))
    assert torch.equal(*outputs)
    assert peaks[1] < 0.95 * peaks[0]


# --------------------------------------------------------------------------------------------------------------- inference
@EXACT
@EVERY_NETWORK
def test_optimised_inference_is_the_model(name: str) -> None:
    _, there = on_both(name)
    x = images().to(DEVICE)
    fast = se_fx.optimize_for_inference(there, x)
    for batch in (x, x[:1], x.contiguous(memory_format=torch.channels_last)):
        assert_near(fast(batch), there(batch).cpu())


@EXACT
def test_compiled() -> None:
    _, there = on_both("timm's seresnet18")
    x = images().to(DEVICE)
    for model in (there, se_fx.optimize_for_inference(there, x)):
        torch._dynamo.reset()
        assert_near(torch.compile(model, fullgraph=True)(x), there(x).cpu())


@pytest.mark.parametrize("training", [False, True])
def test_bench_prints_its_table(training: bool) -> None:
    _, there = on_both("resnet18")
    result = se_fx.bench(there, images().to(DEVICE), training=training, compiled="both", rounds=3)
    print(result)
    assert result.device.startswith(DEVICE.type)
    assert all(row.peak_bytes > 0 for row in result.rows)


def test_blocks_travel_from_device_to_device(tmp_path: Path) -> None:
    here, there = on_both("resnet18")
    se_fx.save_blocks(there, tmp_path / "blocks.safetensors")
    plain = se_fx.remove(here)
    se_fx.load_blocks(plain, tmp_path / "blocks.safetensors")
    assert torch.equal(plain(images()), here(images()))  # drawn from one seed


def test_gates_and_scores() -> None:
    _, there = on_both("resnet18")
    x = images(16).to(DEVICE)
    assert se_fx.profile_gates(there, [x], progress=False).sites
    plain = se_fx.remove(there)
    plan = se_fx.plan(plain, placement="residual", min_channels=64)
    scored = se_fx.score(plain, plan, [(x, torch.arange(16, device=DEVICE))], F.cross_entropy, progress=False)
    assert all(site.score is not None for site in scored.sites)
