"""What is done with models after they are built: export, distribution, checkpoints; for all three kinds of result."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import se_fx


class TwoModes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.5, self.training))


class Split(TwoModes):
    """Runs its own code, since that has an optional argument; its submodule is a region."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TwoModes()
        self.a = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.body(x)
        if mask is not None:
            x = x * mask
        return super().forward(x)


KINDS = {
    "whole graph": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)),
    "two modes": TwoModes,
    "split": Split,
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return se_fx.transform(KINDS[request.param](), min_channels=1, latent_channels=2)


X = torch.randn(4, 3, 8, 8)


def test_the_kinds_are_what_they_are_called() -> None:
    kinds = {name: se_fx.report(se_fx.transform(make(), min_channels=1)).regions for name, make in KINDS.items()}
    assert kinds == {"whole graph": ("",), "two modes": ("",), "split": ("body",)}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_export(model: nn.Module, strict: bool, dynamic: bool) -> None:
    model.eval()
    shapes = ({0: torch.export.Dim("batch", min=2)},) if dynamic else None
    if isinstance(model, Split) and shapes:
        shapes = (*shapes, None)
    args = (X, None) if isinstance(model, Split) else (X,)
    program = torch.export.export(model, args, dynamic_shapes=shapes, strict=strict)
    exported = program.module()
    torch.testing.assert_close(exported(*args), model(X))  # the same kernels, decomposed: fp32's default tolerances
    if dynamic:
        larger = torch.cat([X, X])
        torch.testing.assert_close(exported(larger, *args[1:]), model(larger))
    assert set(program.state_dict) == set(model.state_dict())


def test_checkpoints_with_weights_only(model: nn.Module) -> None:
    file = io.BytesIO()
    plan = se_fx.plan(KINDS["whole graph"](), min_channels=1, latent_channels=2)
    torch.save({"plan": plan.to_dict(), "state_dict": model.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    model.load_state_dict(loaded["state_dict"])
    assert se_fx.Plan.from_dict(loaded["plan"]) == se_fx.Plan(plan.sites)


def test_torch_save_of_the_whole_module(model: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(model.eval(), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), model(X))


def test_jit_trace(model: nn.Module) -> None:
    model.eval()
    torch.testing.assert_close(torch.jit.trace(model, X)(X), model(X))


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_and_then_transforming_is_refused(model: nn.Module) -> None:
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(X).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(se_fx.SqueezeExciteError, match="transform the plain model first"):
        se_fx.transform(wrapped)


@pytest.mark.usefixtures("process_group")
def test_fsdp2_and_then_transforming_is_refused(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected = model.eval()(X)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert torch.equal(model(X), expected)
    model.train()(X).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(se_fx.SqueezeExciteError, match="transform the plain model first"):
        se_fx.transform(model)


def test_sync_batchnorm_conversion_and_fusing() -> None:
    model = se_fx.transform(KINDS["whole graph"](), min_channels=1)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    converted.eval()(X)


def test_meta_then_to_empty(model: nn.Module) -> None:
    rebuilt = se_fx.transform(KINDS["whole graph"]().to("meta"), min_channels=1).to_empty(device="cpu")
    source = se_fx.transform(KINDS["whole graph"](), min_channels=1).eval()
    rebuilt.load_state_dict(source.state_dict())
    assert torch.equal(rebuilt.eval()(X), source(X))


def test_ema(model: nn.Module) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged.eval()(X), model.eval()(X))


def test_training_under_bf16_autocast_compiled_does_not_recompile() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = se_fx.transform(TwoModes(), min_channels=1, latent_channels=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(X).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
