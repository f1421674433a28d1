"""Transforms every model of a zoo that has a Conv2d, and checks that nothing about it changed.

For each model: `se_fx.transform(model, init="identity")` with a block after every conv that may have one; then, on a small
random input, whether the outputs are bitwise those of the original, whether all its keys are there with the very same
Parameter objects, and whether there is a block. Weights are noise: what a model computes doesn't matter here.

    python examples/zoo.py timm                       # all of timm's conv models, a table on standard output
    python examples/zoo.py timm --filter 'resnet*'    # some
    python examples/zoo.py torchvision --train --markdown zoo.md
    python examples/zoo.py torchvision --train --in-place        # blocks in the model itself, at each placement
    python examples/zoo.py strangers                             # networks of other packages, see strangers.py
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import inspect
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from inspect import getattr_static
from typing import Any
from unittest import mock

import torch
from strangers import strangers_attempts, strangers_names
from tabulate import tabulate
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from tqdm import tqdm

import se_fx
from se_fx.insertion import undone_on_failure

MEMORY_LIMIT = 8 * 2**30  # bytes of parameters


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    kind: str = ""
    regions: int = 0
    sites: int = 0
    seconds: float = 0.0
    result: str = ""
    optimized: str = ""

    @property
    def good(self) -> bool:
        return self.result.startswith(("equal", "not run")) and self.close

    @property
    def close(self) -> bool:
        off, _, precision = self.optimized.partition(" ")
        return not off or float(off) <= (1e-9 if precision == "(float64)" else 1e-4)


class FastInit(TorchFunctionMode):
    """Leaves out random initialisation of weights, which for large models takes longer than all else."""

    SKIPPED = {"normal_", "uniform_", "erfinv_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.SKIPPED:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.ndim > 1:
                return tensor
        return func(*args, **kwargs)


def truncated_normal(tensor: Tensor, mean: float = 0.0, std: float = 1.0, *args: Any, **kwargs: Any) -> Tensor:
    """In place of PyTorch's, which draws until all values are within bounds: never, if drawing is left out."""
    return tensor if tensor.ndim > 1 else tensor.normal_(mean, std)


def with_noise(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with small random weights."""
    with FastInit(), mock.patch.object(nn.init, "_no_grad_trunc_normal_", truncated_normal):
        model = build()
    noise = torch.randn(2**16, generator=torch.Generator().manual_seed(0)) * 0.05
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.dtype.is_floating_point:
            flat = parameter.data.view(-1)
            flat.copy_(noise.repeat(flat.numel() // noise.numel() + 1)[: flat.numel()])
    return model


# ------------------------------------------------------------------------------------------------------------------ zoos
def torchvision_names() -> list[str]:
    from torchvision.models import list_models

    return list_models()


Attempt = tuple[Callable[[], nn.Module], tuple[Any, ...]]  # how to build a model, and what to call it with


def torchvision_attempts(name: str) -> Iterator[Attempt]:
    """Ways to build and call a model, cheapest first."""
    from torchvision.models import get_model, get_model_builder

    builder = get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in builder.__annotations__:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    package = builder.__module__
    if ".detection" in package:
        if "ssd" not in name:  # else images are scaled to 800 pixels
            options |= {"min_size": 64, "max_size": 96}
        if "rcnn" in name:  # else hundreds of boxes, which random weights all take for objects
            options |= {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16}
        inputs: list[Any] = [([torch.rand(3, 64, 80), torch.rand(3, 96, 64)],)]
    elif ".optical_flow" in package:
        inputs = [(torch.rand(1, 3, 128, 128) * 2 - 1, torch.rand(1, 3, 128, 128) * 2 - 1)]
    elif ".video" in package:
        inputs = [(torch.rand(2, 3, frames, size, size),) for frames, size in ((4, 32), (16, 64), (16, 224))]
    else:
        inputs = [(torch.rand(2, 3, size, size),) for size in (32, 64, 96, 224, 299)]
    for args in inputs:
        if ".vision_transformer" in package and args[0].shape[-1] % 32 == 0:
            options["image_size"] = args[0].shape[-1] // 32 * 28 if name.endswith("14") else args[0].shape[-1]
            args = (args[0][..., : options["image_size"], : options["image_size"]],)
        yield (lambda chosen=dict(options): get_model(name, **chosen)), args


def timm_names() -> list[str]:
    import timm

    return timm.list_models()


def timm_attempts(name: str) -> Iterator[Attempt]:
    """Ways to build and call a model, cheapest first: many take an image size, others are fine with any image."""
    import timm

    with torch.device("meta"):
        probe = timm.create_model(name, pretrained=False)
    channels, height, width = probe.pretrained_cfg["input_size"]
    sized = "img_size" in inspect.signature(type(probe).__init__).parameters
    for size in (64, 112, 128):
        if size < height and not (sized is False and probe.pretrained_cfg.get("fixed_input_size")):
            options = {"img_size": size} if sized else {}
            yield (
                (lambda chosen=options: timm.create_model(name, pretrained=False, **chosen)),
                (torch.rand(2, channels, size, size),),
            )
    for batch in (1, 2):  # some norms of vectors want two in train mode
        yield (lambda: timm.create_model(name, pretrained=False)), (torch.rand(batch, channels, height, width),)


ZOOS = {
    "torchvision": (torchvision_names, torchvision_attempts),
    "timm": (timm_names, timm_attempts),
    "strangers": (strangers_names, strangers_attempts),
}


# ----------------------------------------------------------------------------------------------------------------- checks
def same(a: Any, b: Any) -> bool:
    """Whether two outputs are of the same structure and types, and bitwise equal; NaNs equal NaNs."""
    (leaves, spec), (others, other_spec) = tree_flatten(a), tree_flatten(b)
    return spec == other_spec and len(leaves) == len(others) and all(map(same_leaf, leaves, others))


def same_leaf(a: Any, b: Any) -> bool:
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return same(vars(a), vars(b))
    if not isinstance(a, Tensor):
        return bool(type(a) is type(b) and a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()))


def check(name: str, attempts: Callable[[str], Iterator[Attempt]], modes: tuple[bool, ...]) -> Row | None:
    """One model's row; None for a model without Conv2d."""
    found = load(name, attempts, modes)
    return check_transform(name, Original(*found, modes)) if isinstance(found, tuple) else found


def check_in_place(name: str, attempts: Callable[[str], Iterator[Attempt]], modes: tuple[bool, ...]) -> Row | None:
    """One model's row, of blocks that are put into it at each placement in turn."""
    found = load(name, attempts, modes)
    return check_placements(name, Original(*found, modes)) if isinstance(found, tuple) else found


def check_transform(name: str, before: Original) -> Row:
    start = time.perf_counter()
    rewritten = se_fx.transform(before.model.eval(), min_channels=1, latent_channels=4, init="identity")
    seconds = time.perf_counter() - start
    report = se_fx.report(rewritten)
    kind = "graph" if "" in report.regions else "own class"
    result = before.difference_transformed(rewritten) or "equal" if report.sites else "no site"
    return Row(name, kind, len(report.regions), len(report.sites), seconds, result)


def check_placements(name: str, before: Original) -> Row:
    """Blocks in the model itself, at each placement that it has places for, and gone again before the next."""
    model = before.model.eval()
    done, sites, seconds = [], 0, 0.0
    for placement in se_fx.placement.PLACEMENTS:
        with undone(model):
            start = time.perf_counter()
            try:
                se_fx.apply_squeeze_excite(model, 4, 1, placement=placement, init="identity")
            except se_fx.SqueezeExciteError as error:
                if "no such place" in str(error):
                    continue
                raise
            seconds += time.perf_counter() - start
            done.append(placement)
            sites += len(se_fx.blocks_of(model))
            result = before.difference(model) or before.difference_removed(model)
        if result:
            return Row(name, placement, 0, sites, seconds, result)
    result = "no site" if not done else "equal; a hook is refused" if before.refused else "equal"
    return Row(name, ", ".join(done), 0, sites, seconds, result)


class Undo(Exception):
    """Raised so that what was done is undone."""


@contextlib.contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """The model is afterwards what it was before: cheaper than a copy, and what `apply_squeeze_excite` does when it fails."""
    with contextlib.suppress(Undo), undone_on_failure(model):
        yield
        raise Undo


class Original:
    """What a model is and does, noted before blocks are put into it."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], modes: tuple[bool, ...]) -> None:
        self.model, self.args = model, args
        self.refused = False  # whether hooks were, with the reason
        self.modules = dict(model.named_modules())
        self.leaves = {key: each for key, each in self.modules.items() if not each._modules}
        self.classes = {key: type(each) for key, each in self.modules.items()}
        attributes = {key: flat_attributes(each) for key, each in self.modules.items()}
        self.state = model.state_dict(keep_vars=True)
        self.buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
        self.runs = {training: self.run(model, training) for training in modes}
        self.attributes = {  # but for what the model itself sets when it runs
            key: {name: value for name, value in attributes[key].items() if after.get(name, self) is value}
            for key, after in ((key, flat_attributes(each)) for key, each in self.modules.items())
        }

    def run(self, model: nn.Module, training: bool, hooked: bool = True) -> tuple[Any, dict[str, Tensor], list[str]]:
        """Its outputs, its buffers afterwards, and which of the modules without children were called, in order."""
        calls: list[str] = []
        modules = dict(model.named_modules())
        hooks = [
            modules[key].register_forward_hook(lambda *_, key=key: calls.append(key))  # type: ignore[misc]
            for key in (self.leaves if hooked else ())
        ]
        try:
            outputs = seeded(model.train(training), args_for(model, self.args))
            after = {key: model.get_buffer(key).clone() for key in self.buffers}
        finally:
            for key, value in self.buffers.items():
                model.get_buffer(key).copy_(value)
            for hook in hooks:
                hook.remove()
        return outputs, after, calls

    def run_again(self, model: nn.Module, training: bool, hooked: bool) -> tuple[Any, ...]:
        """The same; without hooks, or of a model that refuses them, the first two."""
        if hooked:
            try:
                return self.run(model, training)
            except se_fx.SqueezeExciteError as error:
                if "hooks were registered" not in str(error):
                    raise
                self.refused = True
        return self.run(model, training, hooked=False)[:2]

    def difference_transformed(self, model: nn.Module) -> str:
        """How a graph of the model, with blocks, is not the model; empty where keys, Parameters, outputs, buffers are equal."""
        return self.difference_of_state(model, object) or self.difference_of_runs(model, self.runs, hooked=False)

    def difference_of_state(self, model: nn.Module, kept: type) -> str:
        """How the keys are not the model's and blocks', or values that are of the type `kept` not the same objects."""
        state = model.state_dict(keep_vars=True)
        if any(state.get(key) is not value for key, value in self.state.items() if isinstance(value, kept)):
            return "keys or Parameters lost"
        return "foreign keys" if any(map(is_foreign, state.keys() - self.state.keys())) else ""

    def difference(self, model: nn.Module) -> str:
        """How the model is not, now that it has blocks, what it was, or does not what it did; empty where all is equal."""
        if lost := self.difference_of_state(model, Tensor):
            return lost
        modules = dict(model.named_modules())
        if any(modules.get(key) is not value for key, value in self.modules.items()):
            return "modules lost"
        if any(map(is_foreign, modules.keys() - self.modules.keys())):
            return "foreign modules"
        for key, own in self.classes.items():
            if not isinstance(modules[key], own):
                return f"class of {key} lost"
            if lost := [each for each, code in methods(own).items() if getattr_static(type(modules[key]), each) is not code]:
                return f"methods of {key} lost: {', '.join(lost)}"
            now = flat_attributes(modules[key])
            if lost := [each for each, value in self.attributes[key].items() if now.get(each, self) is not value]:
                return f"attributes of {key} lost: {', '.join('.'.join(each) for each in lost)}"
        return self.difference_of_runs(model, self.runs)

    def difference_removed(self, model: nn.Module) -> str:
        """How what `remove` makes of the model is not the original."""
        removed = se_fx.remove(model)
        if {key: type(each) for key, each in removed.named_modules()} != self.classes:
            return "not removed"
        state = removed.state_dict(keep_vars=True)
        if state.keys() != self.state.keys() or any(state[key] is not value for key, value in self.state.items()):
            return "keys or Parameters not as they were, removed"
        return f"{difference}, removed" if (difference := self.difference_of_runs(removed, list(self.runs)[-1:])) else ""

    def difference_of_runs(self, model: nn.Module, modes: Iterable[bool], hooked: bool = True) -> str:
        for training in modes:
            what = ("outputs", "buffers", "calls")
            for each, found, known in zip(what, self.run_again(model, training, hooked), self.runs[training], strict=False):
                if not same(found, known):
                    return f"{each} differ in {'train' if training else 'eval'} mode"
        return ""


def is_foreign(key: str) -> bool:
    """Whether a key is none of a block's, which stand in `squeeze_excite`, or in `se_fx` where that name is taken."""
    return not {"squeeze_excite", "se_fx"}.intersection(key.split("."))


def methods(own: type) -> dict[str, Any]:
    """What a class, and those it is made from, define of their own, but for PyTorch's, of which Rewritten overrides some."""
    inherited = (each for each in own.__mro__ if each is not object and not each.__module__.startswith("torch."))
    names = {name for each in inherited for name, value in vars(each).items() if hasattr(value, "__get__")}
    return {name: getattr_static(own, name) for name in names if not name.startswith("__") and name != "forward"}


def flat_attributes(module: nn.Module) -> dict[tuple[str, ...], Any]:
    """A module's attributes, and what PyTorch keeps in dicts of it: parameters, buffers, hooks."""
    flat: dict[tuple[str, ...], Any] = {}
    for name, value in vars(module).items():
        if name != "training":
            flat[name,] = value
        if isinstance(value, dict):
            flat |= {(name, str(key)): inner for key, inner in value.items()}
    return flat


def seeded(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """A call, the same each time, of code that may draw random numbers."""
    torch.manual_seed(0)
    return model(*args)


def args_for(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Detectors want targets in train mode."""
    if not model.training or not isinstance(args[0], list):
        return args
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    target |= {"keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17])}
    return args[0], [target | {"masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8)} for image in args[0]]


def check_stranger(name: str, attempts: Callable[[str], Iterator[Attempt]], modes: tuple[bool, ...]) -> Row | None:
    """One model's row, transformed, then with blocks in place at each placement; last, how far off it is optimised."""
    found = load(name, attempts, modes)
    if not isinstance(found, tuple):
        return found
    before = Original(*found, modes)
    in_place = check_placements(name, before)
    row = check_transform(name, before) if in_place.good else in_place
    if not row.good:
        return row
    return dataclasses.replace(row, result=in_place.result, optimized=difference(*found))


def difference(model: nn.Module, args: tuple[Any, ...]) -> str:
    """How far a transformed model is from the same optimised, of its outputs' largest value; norms do something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    rewritten = se_fx.transform(model.eval(), min_channels=1, latent_channels=4)
    try:
        given = tree_map_only(Tensor, lambda each: each.double() if each.is_floating_point() else each, args)
        expected, word = seeded(rewritten.double(), given), "float64"
    except Exception:  # code that makes tensors of its own types
        given = args
        expected, word = seeded(rewritten.float(), given), "float32"
    outputs = expected, seeded(se_fx.optimize_for_inference(rewritten), given)
    pairs = [each for each in zip(*map(leaves_of, outputs), strict=True) if isinstance(each[0], Tensor)]
    off = max(
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs if a.is_floating_point() and a.numel()
    )
    return f"{off:.0e} ({word})"


def leaves_of(value: Any) -> list[Any]:
    leaves = (leaves_of(vars(leaf)) if dataclasses.is_dataclass(leaf) else [leaf] for leaf in tree_leaves(value))
    return [leaf for each in leaves for leaf in each]


def load(
    name: str, attempts: Callable[[str], Iterator[Attempt]], modes: tuple[bool, ...]
) -> tuple[nn.Module, tuple[Any, ...]] | Row | None:
    """A model and what to call it with; None for one without Conv2d, a row that says why for one that can't be run."""
    failure = ""
    for build, args in attempts(name):
        try:
            size, has_convs = describe(build)
            if not has_convs:
                return None
            if size > MEMORY_LIMIT:
                return Row(name, result=f"not run: {size / 2**30:.0f} GiB of parameters")
            model = with_noise(build)
            for training in modes:
                output = model.train(training)(*args_for(model, args))
                if not any(isinstance(leaf, Tensor) for leaf in leaves_of(output)):
                    raise ValueError(f"returns no tensor, training={training}")
        except Exception as error:
            failure = f"the original fails: {type(error).__name__}: {error}"[:100]
            continue
        return model, args
    return Row(name, result=failure)


def describe(build: Callable[[], nn.Module]) -> tuple[int, bool]:
    """The bytes of a model's parameters, and whether it has a Conv2d; built on the meta device where that works."""
    try:
        with torch.device("meta"):
            model = build()
    except (RuntimeError, NotImplementedError):  # reads values while it builds itself
        model = with_noise(build)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return size, any(isinstance(module, nn.Conv2d) for module in model.modules())


def run(zoo: str, pattern: str, modes: tuple[bool, ...], after: str = "", in_place: bool = False) -> Iterator[Row]:
    """The rows of all models of a zoo whose name matches."""
    names, attempts = ZOOS[zoo]
    checks = check_in_place if in_place else check_stranger if zoo == "strangers" else check
    patterns = pattern.split(",")
    chosen = [name for name in names() if any(fnmatch.fnmatchcase(name, each) for each in patterns) and name > after]
    for name in (bar := tqdm(chosen, desc=zoo)):
        bar.set_postfix_str(name)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = checks(name, attempts, modes)
        except Exception as error:
            row = Row(name, result=f"{type(error).__name__}: {error}"[:160])
        if row is not None:
            yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", choices=ZOOS)
    parser.add_argument("--filter", default="*", metavar="GLOB", help="only models named so; several, with commas between")
    parser.add_argument("--after", default="", metavar="NAME", help="only models whose name sorts after this one")
    parser.add_argument("--train", action="store_true", help="compare in train mode too")
    parser.add_argument("--in-place", action="store_true", help="put blocks into the model itself, at each placement in turn")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there too, row by row")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    modes = (False, True) if arguments.train or arguments.zoo == "strangers" else (False,)
    for row in run(arguments.zoo, arguments.filter, modes, arguments.after, arguments.in_place):
        rows.append(row)
        if not row.good:
            tqdm.write(f"{row.name}: {row.result}")
        if arguments.markdown and len(rows) % 20 == 0:
            write_markdown(arguments.markdown, rows)
    if arguments.markdown:
        write_markdown(arguments.markdown, rows)
    good = sum(row.good for row in rows)
    print(table(rows, "simple"), f"{good} of {len(rows)} as they should be", sep="\n\n")
    return 0 if good == len(rows) else 1


def table(rows: list[Row], form: str) -> str:
    headers = ["model", "result is", "graph regions", "sites", "transform, s", "outputs"]
    cells = [[r.name, r.kind, r.regions, r.sites, f"{r.seconds:.2f}", r.result, r.optimized] for r in rows]
    if any(row.optimized for row in rows):
        return tabulate(cells, [*headers, "optimised, off"], form, disable_numparse=True)
    return tabulate([row[:-1] for row in cells], headers, form, disable_numparse=True)


def write_markdown(path: str, rows: list[Row]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(table(rows, "github") + "\n")


if __name__ == "__main__":
    sys.exit(main())
