"""Models that are wrapped or sharded: what is refused, what is said, and what SyncBatchNorm and FSDP2 make of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_copies import KINDS, X, weights
from test_distributed import data, kind, small
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import se_fx


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def one_mesh() -> Any:
    return init_device_mesh("cpu", (1,))


@pytest.mark.usefixtures("process_group")
def test_fsdp2_of_a_module_that_a_graph_does_not_call() -> None:
    model, x = small(), data(0, torch.float64)[0]
    expected = model(x)
    fully_shard(model.layer1, mesh=one_mesh())  # its hooks gather weights; the graph calls its convs alone, and stands back
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", KINDS)
def test_sync_batchnorm_reaches_every_norm_and_keeps_the_blocks(name: str) -> None:
    plain = se_fx.transform(nn.Sequential(KINDS[name](), nn.BatchNorm2d(8)), min_channels=1, latent_channels=2).eval()
    expected, norms = plain(X), sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == norms
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert torch.equal(converted(X), expected)
    assert len(weights(converted)) == 2 * len(se_fx.report(converted).sites)


@pytest.mark.usefixtures("process_group")
def test_sync_batchnorm_does_not_train_on_a_cpu_with_or_without_blocks() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    for model in (plain, se_fx.transform(plain, min_channels=1)):
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            converted(X)
        with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
            DistributedDataParallel(converted)


def fsdp1(model: nn.Module) -> nn.Module:
    """FSDP1 can't be made without an accelerator: what it would be."""
    made = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(made)
    made._modules["_fsdp_wrapped_module"] = model
    return made


def of_submodule(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: nn.Module) -> nn.Module:
        model[2] = wrap(model[2])
        return model

    return wrapped


WRAPPED = {
    "DistributedDataParallel": DistributedDataParallel,
    "DistributedDataParallel of a submodule": of_submodule(DistributedDataParallel),
    "DataParallel": nn.DataParallel,
    "replicate": replicate,
    "FSDP1": fsdp1,
    "FSDP2": lambda model: fully_shard(model, mesh=one_mesh()),
    "FSDP2 of a submodule": of_submodule(lambda module: fully_shard(module, mesh=one_mesh())),
}
SHARDED = {
    "tensor parallel": lambda model: parallelize_module(model, one_mesh(), {"4": ColwiseParallel()}),
    "distribute_module": lambda model: distribute_module(model, one_mesh()),
}
CALLS = {
    "transform": lambda model: se_fx.transform(model, min_channels=1),
    "plan": lambda model: se_fx.plan(model, min_channels=1),
    "suggest": se_fx.suggest,
    "apply_squeeze_excite": lambda model: se_fx.apply_squeeze_excite(model, min_channels=1),
    "optimize_for_inference": lambda model: se_fx.optimize_for_inference(model.eval()),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("how", [*WRAPPED, *SHARDED])
def test_what_is_wrapped_or_sharded_is_refused(how: str) -> None:
    model = {**WRAPPED, **SHARDED}[how](nn.Sequential(*KINDS["whole graph"](), nn.Linear(8, 8)))
    for call in CALLS.values():
        before = model.state_dict().keys()
        with pytest.raises(se_fx.SqueezeExciteError) as caught:
            call(model)
        message = str(caught.value)
        assert ("wrapped for distribution already" if how in WRAPPED else "distributed already, as a DTensor") in message
        part = {"tensor parallel": "'4'", "distribute_module": "'0'"}.get(how, "'2'" if "submodule" in how else "")
        assert message.startswith(f"model's submodule {part} " if part else "model is ")
        assert message.endswith("transform the plain model first, then wrap or shard the result")
        assert model.state_dict().keys() == before


@pytest.mark.usefixtures("process_group")
def test_what_to_pass_of_a_rewritten_model_that_was_wrapped() -> None:
    rewritten = kind("whole graph").float()
    profile = se_fx.profile_gates(rewritten, [X], progress=False)
    calls: list[Callable[[nn.Module], Any]] = [
        se_fx.Plan.of,
        se_fx.report,
        se_fx.remove,
        lambda model: se_fx.profile_gates(model, [X], progress=False),
        lambda model: se_fx.fold_gates(model, profile, 0.1),
    ]
    wrapped = DistributedDataParallel(rewritten)
    for call in calls:
        with pytest.raises(se_fx.SqueezeExciteError, match=r"got DistributedDataParallel; pass its \.module"):
            call(wrapped)
        call(wrapped.module)


@pytest.mark.usefixtures("process_group")
def test_what_needs_whole_tensors_is_refused_after_fsdp2_and_gates_can_be_profiled() -> None:
    rewritten = kind("whole graph").float()
    profile = se_fx.profile_gates(rewritten, [X], progress=False)
    report = str(se_fx.report(rewritten))
    fully_shard(rewritten, mesh=one_mesh())
    for call in (se_fx.remove, lambda model: se_fx.report(model, X), lambda model: se_fx.fold_gates(model, profile, 0.1)):
        with pytest.raises(se_fx.SqueezeExciteError, match="load the full state_dict into it"):
            call(rewritten)
    assert str(se_fx.report(rewritten)) == report
    assert str(se_fx.profile_gates(rewritten, [X], progress=False)) == str(profile)
