"""Random networks: trees of pieces, with an input and an output of some form.

a network        takes its image as one of INPUTS has it, and returns its feature map as one of OUTPUTS has it
└─ its body      a few trees, one after the other, and between them rows of DOWN, which halve the map
   └─ a tree     a row of LAYERS (a module, ours or others'), a row of CODE (a forward over a few layers), or
                 a row of AROUND (code around one or two trees, or a hook on one)
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import hypothesis.strategies as st
import torch
from pieces import AROUND, CODE, DOWN, LAYERS, WIDTH, Around, Batch, Code, Pair, conv, double
from torch import Tensor, nn

__all__ = ["INPUTS", "OUTPUTS", "Recipe", "recipes"]


class Network(nn.Module):
    """Takes an image."""

    def __init__(self, body: list[nn.Module], output: str) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, 6, 1)
        self.body, self.output = nn.Sequential(*body), output

    def run(self, image: Tensor, given: Any) -> Any:
        return OUTPUTS[self.output](self.head(self.body(self.norm(self.stem(image)))), given)

    def forward(self, x: Tensor) -> Any:
        return self.run(x, x)


class TakesContainer(Network):
    def forward(self, batch: Any) -> Any:
        return self.run(batch["image"] if isinstance(batch, dict) else batch.image, batch)


class TakesFields(Network):
    def forward(self, batch: Any) -> Any:
        return self.run(batch.image * 2, batch.image)


class TakesItems(Network):
    def forward(self, batch: Any) -> Any:
        return self.run(batch["image"], batch["image"])


class TakesPair(Network):
    def forward(self, pair: Any) -> Any:
        image, extra = pair
        return self.run(image, extra)


class TakesSome(Network):
    def forward(self, *images: Tensor) -> Any:
        return self.run(images[0], images[-1])


class TakesKeywords(Network):
    def forward(self, **batch: Any) -> Any:
        return self.run(batch["image"], batch.get("extra"))


class TakesOptions(Network):
    def forward(self, image: Tensor, mask: Tensor | None = None, scale: float = 1.0, *, extra: Any = None) -> Any:
        if mask is not None:
            image = image * mask
        return self.run(image * scale, extra)


#: How a network takes its image: its class, and the arguments to call it with.
INPUTS = {
    "tensor": (Network, lambda x: ((x,), {})),
    "keyword": (Network, lambda x: ((), {"x": x})),
    "dict": (TakesItems, lambda x: (({"image": x, "extra": None},), {})),
    "dict, asked": (TakesContainer, lambda x: (({"image": x},), {})),
    "dataclass": (TakesFields, lambda x: ((Batch(x),), {})),
    "dataclass, asked": (TakesContainer, lambda x: ((Batch(x, 3),), {})),
    "NamedTuple": (TakesFields, lambda x: ((Pair(x),), {})),
    "tuple": (TakesPair, lambda x: (((x, None),), {})),
    "list": (TakesPair, lambda x: (([x, 2.5],), {})),
    "*args": (TakesSome, lambda x: ((x, x + 1), {})),
    "**kwargs": (TakesKeywords, lambda x: ((), {"image": x, "extra": "a string"})),
    "defaults": (TakesOptions, lambda x: ((x,), {})),
    "None and scalars": (TakesOptions, lambda x: ((x, None, 0.5), {})),
    "mask": (TakesOptions, lambda x: ((), {"image": x, "mask": x > 0, "extra": [x, 3]})),
}
#: How a network returns its feature map y, having been given `given`.
OUTPUTS = {
    "tensor": lambda y, given: y,
    "tuple": lambda y, given: (y, None),
    "list": lambda y, given: [y, y],
    "dict": lambda y, given: {"out": y, "size": y.shape[-1]},
    "OrderedDict": lambda y, given: collections.OrderedDict(out=y),
    "NamedTuple": lambda y, given: Pair(y, 2),
    "dataclass": lambda y, given: Batch(y, "a string"),
    "nested": lambda y, given: {"maps": [(y, {"half": y / 2})]},
    "with what was given": lambda y, given: (y, given),
    "vector": lambda y, given: y.mean((2, 3)),
    "scalar": lambda y, given: y.square().mean(),
}

Tree = Any  # a name, or (name, tree, tree)


def in_a_list(module: nn.Module, args: Any, output: Any) -> Any:
    return [output]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A random network and its image. The same recipe makes the same network."""

    body: list[Tree]
    input: str = "tensor"
    output: str = "tensor"
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    batch: int = 3
    hooked: str = ""

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        shared = {"shared": conv(1)}
        net = INPUTS[self.input][0]([grow(tree, shared) for tree in self.body], self.output)
        if self.hooked == "network":
            net.register_forward_hook(in_a_list)
        if self.hooked == "body":
            net.body.register_forward_hook(double)
        for module in net.to(self.dtype).modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=self.layout)
        return net

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, 3, 8, 7, generator=generator).to(dtype=self.dtype, memory_format=self.layout)
        return INPUTS[self.input][1](x)


def grow(tree: Tree, shared: dict[str, nn.Module]) -> nn.Module:
    """The module that a tree describes."""
    if not isinstance(tree, str):
        name, inner, other = tree
        return Around(name, grow(inner, shared), grow(other, shared))
    if tree in shared:
        return shared[tree]
    return Code(tree.removeprefix("code: ")) if tree.startswith("code: ") else {**LAYERS, **DOWN}[tree]()


leaves = st.sampled_from([*LAYERS, "shared", "shared", *(f"code: {name}" for name in CODE)])
trees = st.recursive(leaves, lambda inner: st.tuples(st.sampled_from(list(AROUND)), inner, inner), max_leaves=5)
recipes = st.builds(
    Recipe,
    body=st.lists(st.one_of(*[trees] * 7, st.sampled_from(list(DOWN))), min_size=1, max_size=4),
    input=st.sampled_from(list(INPUTS)),
    output=st.sampled_from(list(OUTPUTS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    batch=st.sampled_from([3, 1, 0]),
    hooked=st.sampled_from(["", "", "body", "network"]),
)
