"""Distributed training: two processes of `torchrun` on gloo, against one process on the same global batches.

The processes are this file, run as a program; `CASES` says what they train. Each is seeded differently, so that whatever is
drawn from a global generator differs. Networks' own weights come from one seed, as those of a checkpoint would.

What differs from one process is the order of sums, in gradients (two halves, then their mean) and in statistics. Small networks
are trained in float64, where that is 1e-16 of a value at each step, and more after three: 1e-9 leaves room for nothing else. In
float32, as resnet10 is trained, it is 1e-7 at each step: 1e-5.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from filelock import FileLock
from test_copies import KINDS, weights
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
from train_distributed import shard

import se_fx


# --------------------------------------------------------------------------------------------------------------- models
def built(make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights are the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def resnet10() -> nn.Module:
    """ResNet-18 with one unit in each stage, and with GroupNorm, which takes each sample alone."""
    units = torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]
    network = built(partial(torchvision.models.ResNet, *units, num_classes=10, norm_layer=partial(nn.GroupNorm, 8)))
    return se_fx.transform(network, placement="residual", min_channels=1, latent_channels=1 / 16, init="identity", seed=3)


def small_network() -> nn.Module:
    """With BatchNorm, and few channels."""
    return built(partial(timm.create_model, "test_resnet", num_classes=10)).double()


def small(placement: str = "conv") -> nn.Module:
    return se_fx.transform(small_network(), placement=placement, min_channels=1, latent_channels=1 / 8, seed=3)


def small_in_place() -> nn.Module:
    network = small_network()
    se_fx.apply_squeeze_excite(network, latent_channels=1 / 8, min_channels=1, seed=3)
    return network


def small_by_stages() -> nn.Module:
    """Each stage is a graph of its own, called by the network's own code."""
    network = small_network()
    for name in STAGES:
        stage = getattr(network, name)
        setattr(network, name, se_fx.transform(stage, placement="residual", min_channels=1, latent_channels=1 / 8, seed=3))
    return network


def optimised() -> nn.Module:
    """For training, with blocks in both places from which something can be computed again."""
    return se_fx.optimize_for_training(small("activation"))


STAGES = ("layer1", "layer2", "layer3", "layer4")


def kind(name: str) -> nn.Module:
    return se_fx.transform(built(KINDS[name]).double(), min_channels=1, latent_channels=2, seed=3)


# ------------------------------------------------------------------------------------------------------------- wrapping
PROCESSES, STEPS, BATCH = 2, 3, 8  # BATCH: of all processes together


def sharded(model: nn.Module, apart: Callable[[str, nn.Module], bool] = lambda name, module: False) -> nn.Module:
    """FSDP2 of the root, and of those modules `apart` on their own."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for name, module in model.named_modules():
        if name and apart(name, module):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(DistributedDataParallel(model), backend="aot_eager")


class NormOnAnyDevice(nn.Module):
    """What SyncBatchNorm computes, which DDP takes on accelerators alone: statistics of all processes' samples."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        count = x.numel() / x.shape[1] * PROCESSES
        mean = all_reduce(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight / (variance + self.eps).sqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def synchronised(model: nn.Module) -> nn.Module:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, module in list(converted.named_modules()):
        if isinstance(module, nn.SyncBatchNorm):
            norm = NormOnAnyDevice()
            kept = ("_parameters", "_buffers", "eps", "momentum", "training")
            norm.__dict__.update({attribute: module.__dict__[attribute] for attribute in kept})
            converted.set_submodule(name, norm)
    return converted


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        make: a rewritten network.
        wrap: what distributes it.
        shares: in one process, a batch is taken whole (1), or its processes' shares in turn (2), where these are no samples'
            sum: each process has BatchNorm statistics and dropout masks of its own.
    """

    make: Callable[[], nn.Module]
    wrap: Callable[[nn.Module], nn.Module]
    shares: int = 1


CASES = {
    "DDP, residual": Case(resnet10, DistributedDataParallel),
    "DDP, conv": Case(small, DistributedDataParallel, shares=2),
    "DDP, residual, SyncBatchNorm": Case(lambda: small("residual"), lambda model: DistributedDataParallel(synchronised(model))),
    "DDP, two modes": Case(lambda: kind("two modes"), DistributedDataParallel, shares=2),
    "DDP, two modes, compiled": Case(lambda: kind("two modes"), compiled, shares=2),
    "DDP, split": Case(lambda: kind("split"), DistributedDataParallel, shares=2),
    "FSDP2, residual": Case(resnet10, sharded),
    "FSDP2, conv": Case(small, sharded, shares=2),
    "FSDP2, layers of stages apart": Case(small, shard, shares=2),
    "FSDP2, in place, stages apart": Case(small_in_place, lambda model: sharded(model, lambda n, _: n in STAGES), shares=2),
    "FSDP2, stages transformed": Case(small_by_stages, lambda model: sharded(model, lambda n, _: n in STAGES), shares=2),
    "DDP, optimised": Case(optimised, DistributedDataParallel, shares=2),
    "FSDP2, optimised": Case(optimised, sharded, shares=2),
    "FSDP2, optimised, layers of stages apart": Case(optimised, shard, shares=2),
    "FSDP2, two modes": Case(lambda: kind("two modes"), sharded, shares=2),
    "FSDP2, split": Case(lambda: kind("split"), lambda model: sharded(model, lambda n, _: n == "body"), shares=2),
}


# ------------------------------------------------------------------------------------------------------------- training
def data(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One global batch."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(8, (BATCH,), generator=generator)


def train(model: nn.Module, shares: list[int | None]) -> list[float]:
    """A few steps, in each those shares of a batch in turn, None being all of it; the mean loss of each step."""
    model.train()
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        buffers = {key: value.clone() for key, value in model.named_buffers()}
        total = 0.0
        for index in shares:
            with torch.no_grad():  # buffers are each process's own; those of the last share, process 0's, are kept
                for key, value in model.named_buffers():
                    value.copy_(buffers[key])
            images, labels = data(step, dtype)
            if index is not None:
                images, labels = images.chunk(PROCESSES)[index], labels.chunk(PROCESSES)[index]
                torch.manual_seed(1000 * step + index)  # of dropout
            output = model(images)
            loss = F.cross_entropy(output if output.ndim == 2 else output.mean((-2, -1)), labels)
            (loss / len(shares)).backward()
            total += loss.item() / len(shares)
        optimizer.step()
        losses.append(total)
    return losses


def work(results: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    outcomes = {}
    for name, case in CASES.items():
        torch.manual_seed(100 + rank)
        model = case.make()
        drawn: list[Any] = [None] * PROCESSES
        dist.all_gather_object(drawn, weights(model))
        wrapped = case.wrap(model)
        losses = train(wrapped, [rank])
        mean_losses: list[Any] = [None] * PROCESSES
        dist.all_gather_object(mean_losses, losses)
        if isinstance(wrapped, DistributedDataParallel):
            state = wrapped.module.state_dict()
        else:
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        outcomes[name] = {"drawn": drawn, "losses": torch.tensor(mean_losses, dtype=torch.float64).mean(0), "state": state}
    if rank == 0:
        torch.save(outcomes, results)
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------- tests
@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the processes found, started once, whatever the number of pytest's own processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    results = folder / "distributed.pt"
    with FileLock(f"{results}.lock"):
        if not results.exists():
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
            paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
            command = [*torchrun, __file__, str(results)]
            ran = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=500)
            assert ran.returncode == 0, ran.stderr[-5000:]
    return torch.load(results, weights_only=True)


@pytest.mark.integration
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    case, outcome = CASES[name], outcomes[name]
    model = case.make()
    plain = copy.deepcopy(model)
    for drawn in outcome["drawn"]:
        assert all(torch.equal(drawn[key], value) for key, value in weights(model).items())
    losses = train(model, [None] if case.shares == 1 else [1, 0])

    dtype = next(model.parameters()).dtype
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(outcome["losses"], torch.tensor(losses, dtype=torch.float64), **tolerance)
    torch.testing.assert_close(outcome["state"], dict(model.state_dict()), **tolerance)
    assert any(not torch.equal(outcome["state"][key], value) for key, value in weights(plain).items())

    plain.load_state_dict(outcome["state"])
    x = data(STEPS, dtype)[0]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), model.eval()(x), **tolerance)


def test_the_cases_are_what_they_are_called() -> None:
    report = se_fx.report(resnet10())
    assert (report.regions, len(report.sites)) == (("",), 4)
    assert len(se_fx.report(small()).sites) > len(se_fx.report(small("residual")).sites) == 4
    assert len(se_fx.report(small_by_stages().layer1).sites) == 1


if __name__ == "__main__":
    work(sys.argv[1])
