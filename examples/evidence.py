"""What do blocks bring on real images? Three experiments on Fashion-MNIST, over several seeds, that can be stopped and resumed.

  from-scratch  Squeeze-and-Excitation against none: at as many parameters (the plain network is widened), and in as much time
                (it takes more steps). At the end of residual branches, ten seeds; after each convolution, five.
  blocks        SE, ECA, CBAM and ESE at the end of residual branches, five seeds. Each against the plain network, and against
                the plain network widened to as many parameters as it has with these blocks. All take as many steps.
  score         Where blocks go, if they may have so many parameters and no more: the sites that se_fx.score finds worth most
                for their cost, the cheapest, the last, or random ones; five seeds. `frozen`: the plain network is trained, its
                weights are fixed, and blocks alone learn the same classes on changed images (--task). `from scratch`:
                the network and its blocks are trained together, on images as they are; scores are of untrained weights.

The images are those of Debian's package dataset-fashion-mnist. --dataset digits needs none.

Each run is one network, trained with one seed; it appends a line to OUT/runs.jsonl. Runs that are there already, made with the
same settings, aren't made again, so a stopped script goes on where it was. Several processes share the work by --shard. Each
takes one thread: more would round otherwise. `tables` prints what is there: means, and differences of runs with the
same seed, which saw the same batches in the same order, with their 95 % intervals by Student's t.

    apt-get install dataset-fashion-mnist
    python examples/evidence.py from-scratch blocks score --shard 1/2 &
    python examples/evidence.py from-scratch blocks score --shard 2/2          all three: an hour and a half on two cores
    python examples/evidence.py tables --plot evidence                         tables, and evidence/*.png
    python examples/evidence.py blocks --tiny                                  a first look, in seconds: digits, few steps
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import train
from comparison import Comparison, draw_differences, mean_and_half
from digits import Data, accuracy, batches
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import se_fx

Record = dict[str, Any]
Augment = Callable[[Tensor, torch.Generator], Tensor]

BLOCKS: dict[str, str | None] = {"SE": None, "ECA": "eca", "CBAM": "cbam", "ESE": "ese"}
SCORED_BATCHES = 8
TASKS: dict[str, Augment] = {  # what changes images, for networks that were trained on them as they are
    "noisy": lambda images, generator: images + 0.5 * torch.randn(images.shape, generator=generator),
    "inverted": lambda images, generator: -images,
}
SETTINGS = (
    "dataset",
    "train_images",
    "size",
    "width",
    "units",
    "stride",
    "batch_size",
    "rate",
    "shift",
    "latent_channels",
    "steps",
)
FROZEN_SETTINGS = ("frozen_steps", "task")  # what decides runs of frozen networks besides


# -------------------------------------------------------------------------------------------------------------------- runs
@dataclass(frozen=True)
class Side:
    """One of those that are compared: what is trained, for how long, and the names of those it is compared with."""

    experiment: str
    group: str
    name: str
    seeds: int
    steps: int
    build: Callable[[int], nn.Module]  # from a seed
    against: tuple[str, ...] = ()
    frozen: bool = False

    def key(self, seed: int, arguments: argparse.Namespace) -> Record:
        """What tells one run from others: runs that agree in it have one result."""
        names = SETTINGS + (FROZEN_SETTINGS if self.frozen else ()) + (("share",) if self.experiment == "score" else ())
        settings = {name: getattr(arguments, name) for name in names}
        return {"experiment": self.experiment, "group": self.group, "side": self.name, "seed": seed, "settings": settings}


class Laboratory:
    """The data and the network that all experiments have in common."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.training, self.test, self.classes = train.dataset(arguments)
        self.image = self.training[0][:1]
        self.build = train.builder(arguments, self.classes)
        self.shift = train.augmentation(arguments.shift, arguments.flip)

    def options(self, placement: str = "residual", **others: Any) -> dict[str, Any]:
        shared = {"min_channels": 1, "latent_channels": self.arguments.latent_channels}
        return {"placement": placement, **shared, **others}

    def changed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What frozen networks are given."""
        return TASKS[self.arguments.task](self.shift(images, generator), generator)

    def augment(self, frozen: bool) -> Augment:
        return self.changed if frozen else self.shift

    def held_out(self, frozen: bool) -> list[Data]:
        images, labels = self.test
        if frozen:
            images = TASKS[self.arguments.task](images, torch.Generator().manual_seed(0))
        return batches(images, labels, 500)

    def sample(self, seed: int, frozen: bool) -> list[Data]:
        """A few batches of training data, for scores."""
        generator = torch.Generator().manual_seed(seed)
        images, labels = self.training
        order = torch.randperm(len(images), generator=generator)[: SCORED_BATCHES * self.arguments.batch_size]
        chosen = order.split(self.arguments.batch_size)
        return [(self.augment(frozen)(images[each], generator), labels[each]) for each in chosen]

    def run(self, side: Side, seed: int, tick: Callable[[], object]) -> Record:
        """What is found out by one run."""
        torch.manual_seed(seed)
        model = side.build(seed)
        started = time.process_time()
        if side.steps:
            train.trained(model, self.training, side.steps, seed, self.arguments, self.augment(side.frozen), tick)
        seconds = time.process_time() - started
        return {
            "accuracy": accuracy(model.eval(), self.held_out(side.frozen)),
            "params": _parameters(model),
            "steps": side.steps,
            "seconds": round(seconds, 2),
            "sites": list(_sites(model)),
            "against": side.against,
            "torch": torch.__version__,
        }


def _sites(model: nn.Module) -> Iterator[str]:
    if isinstance(model, torch.fx.GraphModule):
        yield from (site.name for site in se_fx.Plan.of(model).sites)


# ------------------------------------------------------------------------------------------------------------- experiments
def from_scratch(lab: Laboratory) -> Iterator[Side]:
    arguments = lab.arguments
    for placement, seeds in (("residual", 10), ("conv", 5)):
        options = lab.options(placement)
        side = partial(Side, "from-scratch", f'placement="{placement}"', seeds=arguments.seeds or seeds)

        def steps(options: dict[str, Any] = options) -> int:
            return train.steps_in_as_much_time(plain(lab, 1.0, 0), with_blocks(lab, options, 0), lab.image, arguments)

        longer = once(arguments, f"steps in as much time, {placement}", steps)
        names = "none, as many parameters", "none, in as much time"
        yield side(names[0], steps=arguments.steps, build=partial(plain, lab, as_large(lab, options)))
        yield side(names[1], steps=longer, build=partial(plain, lab, 1.0))
        yield side("SE", steps=arguments.steps, build=partial(with_blocks, lab, options), against=names)


def blocks(lab: Laboratory) -> Iterator[Side]:
    arguments = lab.arguments
    side = partial(Side, "blocks", 'placement="residual", init="identity"', seeds=arguments.seeds or 5, steps=arguments.steps)
    plains = {1.0: side("none", build=partial(plain, lab, 1.0))}
    found = []
    for name, block in BLOCKS.items():
        options = lab.options(init="identity", block=block)
        if block is not None:
            del options["latent_channels"]  # is of se_fx's own
        width = as_large(lab, options)
        alike = side(f"none, {width:.4f} times as wide", build=partial(plain, lab, width))
        against = plains[1.0].name, plains.setdefault(width, alike).name
        found.append(side(name, build=partial(with_blocks, lab, options), against=tuple(dict.fromkeys(against))))
    yield from plains.values()
    yield from found


def score(lab: Laboratory) -> Iterator[Side]:
    arguments = lab.arguments
    for frozen in (True, False):
        group = f"frozen, {arguments.task} images" if frozen else "from scratch"
        side = partial(Side, "score", group, seeds=arguments.seeds or 5, frozen=frozen)
        steps = arguments.frozen_steps if frozen else arguments.steps
        yield side("none", steps=0 if frozen else steps, build=partial(pretrained if frozen else plain, lab, 1.0))
        for choice in ("all", "cheapest", "last", "random", "score"):
            against = ("none", "cheapest", "last", "random", "all") if choice == "score" else ("none",)
            yield side(choice, steps=steps, build=partial(placed, lab, choice, frozen), against=against)


def as_large(lab: Laboratory, options: dict[str, Any]) -> float:
    """How many times wider the plain network has as many parameters as the one with blocks, as nearly as widths allow."""
    return train.widened(lambda width: _parameters(lab.build(width)), _parameters(with_blocks(lab, options, 0)))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def plain(lab: Laboratory, width: float, seed: int) -> nn.Module:
    return lab.build(width).train()


def with_blocks(lab: Laboratory, options: dict[str, Any], seed: int) -> nn.Module:
    return se_fx.transform(lab.build(1.0), **options).train()


def pretrained(lab: Laboratory, width: float, seed: int) -> nn.Module:
    """The plain network, trained with this seed, its weights and norms fixed. It's trained once, for all processes."""

    def weights() -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model, steps = lab.build(width).train(), lab.arguments.steps
        return train.trained(model, lab.training, steps, seed, lab.arguments, lab.shift, lambda: None).state_dict()

    model = lab.build(width)
    model.load_state_dict(once(lab.arguments, f"plain network, seed {seed}", weights))
    return model.eval().requires_grad_(False)


def placed(lab: Laboratory, choice: str, frozen: bool, seed: int) -> nn.Module:
    """The network with blocks where the choice has them, for a share of what blocks everywhere would add."""
    model = (pretrained if frozen else plain)(lab, 1.0, seed)
    plan = se_fx.plan(model, example_inputs=lab.image, **lab.options(init="identity"))
    limit = round(lab.arguments.share * plan.added.params)
    if choice == "score":
        plan = se_fx.score(model, plan, lab.sample(seed, frozen), F.cross_entropy)
    return se_fx.transform(model, CHOICES[choice](plan, limit, seed))


def in_order(plan: se_fx.Plan, sites: Iterable[se_fx.Site], limit: int) -> se_fx.Plan:
    """The sites that fit, one after the other."""
    spent, kept = 0, []
    for site in sites:
        if spent + site.cost.params <= limit:
            spent += site.cost.params
            kept.append(site.name)
    return plan.only(*kept)


CHOICES: dict[str, Callable[[se_fx.Plan, int, int], se_fx.Plan]] = {  # from a plan, the most parameters, and a seed
    "all": lambda plan, limit, seed: plan,
    "score": lambda plan, limit, seed: plan.within(params=limit, by="score"),
    "cheapest": lambda plan, limit, seed: plan.within(params=limit),
    "last": lambda plan, limit, seed: in_order(plan, reversed(plan.sites), limit),
    "random": lambda plan, limit, seed: in_order(plan, random.Random(seed).sample(plan.sites, len(plan)), limit),
}
EXPERIMENTS: dict[str, Callable[[Laboratory], Iterator[Side]]] = {
    "from-scratch": from_scratch,
    "blocks": blocks,
    "score": score,
}


# ------------------------------------------------------------------------------------------------------------------- files
def once(arguments: argparse.Namespace, what: str, make: Callable[[], Any]) -> Any:
    """What `make` returned to whoever came first, with these settings: kept in a file, which appears whole or not at all."""
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    digest = hashlib.sha256(json.dumps([what, settings]).encode()).hexdigest()[:12]
    path = Path(arguments.out) / f"{what.replace(', ', '-').replace(' ', '-')}-{digest}.pt"
    if not path.exists():
        made = make()
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        try:
            os.close(descriptor)
            torch.save(made, name)
            os.link(name, path)  # unless another process was first
        except FileExistsError:
            pass
        finally:
            Path(name).unlink()
    return torch.load(path, weights_only=True)


def read(path: Path) -> list[Record]:
    """All runs of a file; a line that was cut off when a process was stopped is left out."""
    records = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def append(path: Path, record: Record) -> None:
    """One line, in one write: processes that append at once don't mix theirs. After a line that was cut off comes a new one."""
    with path.open("ab+") as file:
        cut_off = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * bool(cut_off) + json.dumps(record).encode() + b"\n")


def key_of(record: Mapping[str, Any]) -> str:
    return json.dumps({name: record[name] for name in ("experiment", "group", "side", "seed", "settings")}, sort_keys=True)


# ------------------------------------------------------------------------------------------------------------------ tables
def tables(records: Sequence[Record], plots: Path | None = None) -> str:
    """Of each group, its sides and their differences, as markdown; with a folder, a drawing of each experiment there.

    Runs of other settings are a group of their own.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: (list(EXPERIMENTS).index(record["experiment"]), record["order"])):
        settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items() if value is not None)
        groups.setdefault((record["experiment"], record["group"], settings), []).append(record)
    parts = []
    drawn: dict[str, list[tuple[str, str, str, Comparison]]] = {}
    for (experiment, group, settings), members in groups.items():
        found: dict[str, dict[int, Record]] = {}
        for record in members:
            found.setdefault(record["side"], {})[record["seed"]] = record
        compared = comparisons(found)
        parts += [f"### {experiment}: {group}", settings, _sides_table(found), _differences_table(compared)]
        drawn.setdefault(experiment, []).extend((group, *each) for each in compared)
    for experiment, rows in drawn.items():
        if rows and plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
            draw_differences(experiment, rows, str(plots / f"{experiment}.png"))
    return "\n\n".join(part for part in parts if part)


def comparisons(found: Mapping[str, Mapping[int, Record]]) -> list[tuple[str, str, Comparison]]:
    """Each side, with one that it is compared with, and both accuracies, where at least two seeds have them."""
    result = []
    for name, runs in found.items():
        for other in next(iter(runs.values()))["against"]:
            seeds = sorted(runs.keys() & found.get(other, {}).keys())
            if len(seeds) > 1:
                pairs = [(found[other][seed]["accuracy"], runs[seed]["accuracy"]) for seed in seeds]
                result.append((name, other, Comparison(*map(tuple, zip(*pairs, strict=True)))))
    return result


def _sides_table(found: Mapping[str, Mapping[int, Record]]) -> str:
    rows = []
    for name, runs in found.items():
        mean = {what: sum(run[what] for run in runs.values()) / len(runs) for what in ("params", "steps", "seconds")}
        reached = [run["accuracy"] for run in runs.values()]
        numbers = [f"{mean[what]:,.0f}" for what in ("params", "steps")]
        rows.append([name, len(runs), *numbers, f"{mean['seconds']:.1f}", _percent(reached)])
    headers = ["", "seeds", "parameters", "steps", "processor time, s", "test accuracy, %"]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=("left", *["right"] * 5))


def _differences_table(compared: Sequence[tuple[str, str, Comparison]]) -> str:
    if not compared:
        return ""
    rows = []
    for name, other, each in compared:
        mean, half = mean_and_half(each.differences)
        better = sum(difference > 0 for difference in each.differences)
        count = len(each.differences)
        rows.append([name, other, f"{100 * mean:+.2f} ± {100 * half:.2f}", f"{better} of {count}", each.found])
    headers = ["", "less", "points, 95 % interval", "seeds better", ""]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=("left", "left", "right", "right", "left"))


def _percent(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{100 * values[0]:.2f}"
    mean, half = mean_and_half(values)
    return f"{100 * mean:.2f} ± {100 * half:.2f}"


# -------------------------------------------------------------------------------------------------------------------- main
def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=(*EXPERIMENTS, "tables"), help="experiments to run; or the tables of all")
    parser.add_argument("--out", default="evidence", metavar="DIR", help="where results are, and go (default: evidence)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="take every N-th run, from the I-th on (default: 1/1)")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many of each (default: 10, or 5; see above)")
    parser.add_argument("--tiny", action="store_true", help="seconds: digits, two seeds, three steps, a network of 8 layers")
    parser.add_argument("--plot", metavar="DIR", help="draw the differences of each experiment, into this folder")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", metavar="NAME", help="as for train.py (default: FashionMNIST)")
    add("--root", default="/usr/share/datasets/fashion-mnist", metavar="DIR", help="where it is (default: where Debian has it)")
    add("--train-images", type=int, metavar="N", help="how many to train on (default: 8000)")
    add("--task", choices=TASKS, default="noisy", help="how images change for frozen networks (default: noisy)")

    add = parser.add_argument_group("networks").add_argument
    add("--units", type=int, metavar="N", help="residual units in each of three stages (default: 3, so 20 layers)")
    add("--steps", type=int, metavar="N", help="training steps (default: 400)")
    add("--frozen-steps", type=int, metavar="N", help="of blocks in frozen networks (default: half of these)")
    add("--batch-size", type=int, default=64, metavar="N", help="images in a step (default: 64)")
    add("--rate", type=float, default=5e-3, metavar="LR", help="AdamW's largest learning rate (default: 0.005)")
    add("--share", type=float, default=0.51, help="of all blocks' parameters, what chosen ones may have (default: 0.51)")

    arguments = parser.parse_args(words)
    usual = ("digits", 200, 1, 3) if arguments.tiny else ("FashionMNIST", 8000, 3, 400)
    for name, value in zip(("dataset", "train_images", "units", "steps"), usual, strict=True):
        setattr(arguments, name, getattr(arguments, name) or value)
    arguments.seeds = arguments.seeds or (2 if arguments.tiny else None)
    arguments.frozen_steps = arguments.frozen_steps or max(1, arguments.steps // 2)
    fixed = {"width": 1.0, "stride": 1 if arguments.tiny else 2, "shift": 1, "latent_channels": 0.25, "model": "small"}
    vars(arguments).update(fixed, flip=False, size=None, download=False, device="cpu")
    position, _, count = arguments.shard.partition("/")
    if not (position.isdecimal() and count.isdecimal() and 1 <= int(position) <= int(count)):
        parser.error(f"--shard {arguments.shard}: expected I/N with 1 <= I <= N, such as 1/2")
    arguments.position, arguments.count = int(position), int(count)
    return arguments


def main(words: Sequence[str] | None = None) -> str:
    arguments = parsed(words)
    torch.set_num_threads(1)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.jsonl"
    wanted = [name for name in EXPERIMENTS if name in arguments.what]
    if wanted:
        conduct(Laboratory(arguments), wanted, path)
    printed = tables(
        [record for record in read(path) if not wanted or record["experiment"] in wanted],
        arguments.plot and Path(arguments.plot),
    )
    print(printed or f"{path}: no results yet; run an experiment first: {', '.join(EXPERIMENTS)}")
    return printed


def conduct(lab: Laboratory, wanted: Sequence[str], path: Path) -> None:
    """Make this process's part of the runs that aren't there yet, a seed after the other."""
    arguments = lab.arguments
    for name in wanted:
        sides = list(EXPERIMENTS[name](lab))
        runs = [(order, side, seed) for seed in range(max(side.seeds for side in sides)) for order, side in enumerate(sides)]
        runs = [run for run in runs if run[2] < run[1].seeds][arguments.position - 1 :: arguments.count]
        done = {key_of(record) for record in read(path)}
        runs = [run for run in runs if key_of(run[1].key(run[2], arguments)) not in done]
        with tqdm(total=sum(side.steps for _, side, _ in runs), desc=name, unit="step") as bar:
            for order, side, seed in runs:
                bar.set_postfix_str(f"{side.group}: {side.name}, seed {seed}")
                append(path, {**side.key(seed, arguments), "order": order, **lab.run(side, seed, bar.update)})


if __name__ == "__main__":
    main()
