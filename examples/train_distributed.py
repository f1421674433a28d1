"""A network with Squeeze-and-Excitation, trained by many processes: DDP or FSDP2, on CPUs or GPUs, one machine or many.

It learns scikit-learn's handwritten digits, enlarged. Every process takes its share of each batch of --batch-size images; what
is printed is over all of them. The order of things is what matters, and is the same for your own script:

1. the network, from the same weights in every process;
2. se_fx.transform, with a seed: the same blocks in every process, whatever its own random numbers;
3. SyncBatchNorm, on GPUs;
4. DistributedDataParallel, or fully_shard, of the result;
5. the optimizer, and checkpoints that either strategy, and a single process, can go on from.

    python examples/train_distributed.py                                            one process: try this first
    torchrun --nproc-per-node 2 examples/train_distributed.py                       two processes, or one for each GPU
    torchrun --nproc-per-node 2 examples/train_distributed.py --strategy fsdp
    torchrun --nproc-per-node 2 examples/train_distributed.py --checkpoint se.pt --epochs 2
    torchrun --nproc-per-node 2 examples/train_distributed.py --checkpoint se.pt --epochs 4 --resume
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id digits --rdzv-endpoint HOST:29500 \\
        examples/train_distributed.py                       on each of four machines; HOST is one of them

Without torchrun at hand: python -m torch.distributed.run.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from digits import CLASSES, digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

import se_fx

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole tensors, in the memory of process 0


def join_others() -> torch.device:
    """Meet the other processes, if torchrun has started any; returns the device of this one."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def network(name: str) -> nn.Module:
    """A torchvision network by name, or timm's by timm:NAME, untrained."""
    source, _, name = name.rpartition(":")
    if source == "timm":
        return timm.create_model(name, num_classes=CLASSES)
    return torchvision.models.get_model(name, weights=None, num_classes=CLASSES)


def shard(model: nn.Module) -> nn.Module:
    """FSDP2: each child of the network, with its blocks, is gathered when it is needed, and freed after.

    In a graph a child isn't called, its layers are. So fully_shard is given these, as a list.
    """
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    layers: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            layers.setdefault(name.removeprefix("squeeze_excite.").split(".")[0], []).append(module)
    for each in layers.values():
        fully_shard(each, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def total(*values: float, device: torch.device) -> list[float]:
    """The sums of values over all processes."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], device: torch.device) -> float:
    """One epoch; the mean loss over all processes."""
    model.train()
    losses, count = 0.0, 0
    for images, labels in tqdm(loader, unit="step", leave=False, disable=dist.get_rank() > 0):
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses, count = losses + loss.item() * len(labels), count + len(labels)
    sums = total(losses, count, device=device)
    return sums[0] / sums[1]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Each process takes every n-th image, and none twice. FSDP2 has all call the model equally often."""
    model.eval()
    rank, processes = dist.get_rank(), dist.get_world_size()
    right = 0
    for chosen in torch.arange(len(images)).split(100 * processes):
        mine = chosen[rank::processes]
        right += int((model(images[mine].to(device)).argmax(1) == labels[mine].to(device)).sum())
    return total(right, device=device)[0] / len(images)


def save(path: Path, plan: se_fx.Plan, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """All processes gather, process 0 writes; a run that is cut off leaves the last whole file."""
    weights, state = get_state_dict(model, optimizer, options=WHOLE)
    if dist.get_rank() == 0:
        unfinished = path.with_name(f"{path.name}.part")
        torch.save({"plan": plan.to_dict(), "model": weights, "optimizer": state, "epoch": epoch}, unfinished)
        unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a torchvision network, or timm:NAME (default: resnet18)")
    parser.add_argument(
        "--strategy",
        choices=["ddp", "fsdp"],
        default="ddp",
        help="ddp: every process has the whole network; fsdp: each has a part of every tensor (default: ddp)",
    )
    parser.add_argument("--placement", default="residual", help="of the blocks; conv is for any network (default: residual)")
    parser.add_argument(
        "--latent-channels",
        type=float,
        default=1 / 16,
        metavar="X",
        help="the blocks' width, or its share of channels (default: 0.0625)",
    )
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="passes over the images, in all (default: 3)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images of a step, in all (default: 64)")
    parser.add_argument("--rate", type=float, default=0.02, metavar="LR", help="SGD's learning rate (default: 0.02)")
    parser.add_argument("--size", type=int, default=32, metavar="PIXELS", help="height and width of images (default: 32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights, blocks and batches (default: 0)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="written after every epoch")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint, up to --epochs")
    arguments = parser.parse_args()
    if arguments.resume and not (arguments.checkpoint and arguments.checkpoint.exists()):
        parser.error("--resume: give --checkpoint, a file that a run before has written on a disk that all machines see")

    device = join_others()
    rank, processes = dist.get_rank(), dist.get_world_size()
    if arguments.batch_size < processes:
        parser.error(f"--batch-size {arguments.batch_size}: {processes} processes need an image each")
    say = print if rank == 0 else lambda *_, **__: None
    (images, labels), test = digits(arguments.size)
    dataset = TensorDataset(images, labels)
    sampler = DistributedSampler(dataset, seed=arguments.seed, drop_last=True)
    loader = DataLoader(dataset, arguments.batch_size // processes, sampler=sampler, drop_last=True)

    torch.manual_seed(arguments.seed)  # the same weights everywhere, as those of a file would be
    plain = network(arguments.model).to(device)
    saved = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True, mmap=True) if arguments.resume else None
    if saved:
        model = se_fx.transform(plain, se_fx.Plan.from_dict(saved["plan"]), seed=arguments.seed)
    else:
        options = {"placement": arguments.placement, "min_channels": 1, "latent_channels": arguments.latent_channels}
        model = se_fx.transform(plain, **options, init="identity", seed=arguments.seed)
    plan = se_fx.Plan.of(model)
    torch.manual_seed(arguments.seed + 1 + rank)  # from here on dropout and the like differ
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # on CPUs each process keeps its own statistics
    if arguments.strategy == "fsdp":
        model = shard(model)
    else:
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.rate, momentum=0.9)
    if saved:
        state = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
        set_state_dict(model, optimizer, **state, options=WHOLE)  # each process takes its part

    say(f"{arguments.model}, {len(plan)} blocks; {arguments.strategy}, {processes} x {device.type}, {len(images)} digits")
    for epoch in range(saved["epoch"] if saved else 0, arguments.epochs):
        sampler.set_epoch(epoch)
        loss = train(model, optimizer, loader, device)
        right = accuracy(model, *test, device)
        say(f"  epoch {epoch + 1}: loss {loss:.4f}, {right:.1%} of {len(test[0])} others right", flush=True)
        if arguments.checkpoint:
            save(arguments.checkpoint, plan, model, optimizer, epoch + 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
