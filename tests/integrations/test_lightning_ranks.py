"""Lightning's Trainer in several processes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from lightning_modules import OPTIONS, Net, Small, data, trainer
from test_copies import weights
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from se_fx import SqueezeExciteError
from se_fx.integrations.lightning import SqueezeExcite

pytestmark = pytest.mark.integration


def test_spawned_processes_need_a_module_that_is_rewritten_before(tmp_path: Path) -> None:
    callback, module = SqueezeExcite(**OPTIONS), Small()
    spawning = trainer(tmp_path, callback, strategy="ddp_spawn", devices=2)
    with pytest.raises(SqueezeExciteError, match=r"spawned or forked.*rewrite\(module\) before trainer.fit"):
        callback.setup(spawning, module, "fit")
    callback.rewrite(module)
    callback.setup(spawning, module, "fit")
    assert len(weights(pickle.loads(pickle.dumps(module)))) == 4


class Squeezed(Net):
    """torchvision's SqueezeNet, which has no batch norm: one step's weights don't depend on how its batch is spread."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.stem = path, nn.Identity()
        self.model = torchvision.models.squeezenet1_1(num_classes=10, dropout=0.0)

    def train_dataloader(self) -> DataLoader:
        dataset, ranks = data().dataset, self.trainer.world_size
        sampler = DistributedSampler(dataset, ranks, self.global_rank, shuffle=False)
        return DataLoader(dataset, 8 // ranks, sampler=sampler)

    def setup(self, stage: str) -> None:  # after the callback's; before DDP makes weights equal
        torch.save(weights(self), self.path / f"inserted{self.global_rank}.pt")

    def on_train_end(self) -> None:
        torch.save(self.state_dict(), self.path / f"trained{self.global_rank}.pt")


def train_on(ranks: int, path: Path) -> None:
    module = Squeezed(path)
    settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False} if ranks == 2 else {}
    trainer(path, SqueezeExcite(min_channels=128, latent_channels=4), **settings).fit(module)


def test_two_ranks_insert_equal_blocks_and_train_as_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    torch.manual_seed(0)
    train_on(1, tmp_path / "one")
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(tmp_path / "two")]
    subprocess.run(command, env=paths, check=True, capture_output=True, timeout=300)
    for name in ("inserted", "trained"):
        one, first, second = (torch.load(tmp_path / file) for file in (f"one/{name}0.pt", f"two/{name}0.pt", f"two/{name}1.pt"))
        assert len(one) > 0
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first, one, rtol=1e-5, atol=1e-5)  # gradients are summed in another order


if __name__ == "__main__":  # one rank of two; Lightning starts the other
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))  # ranks that seed themselves differently
    train_on(2, Path(sys.argv[1]))
