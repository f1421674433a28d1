"""Where to scale by a gate: the feature map in a pass of its own, as `se_fx.rewrites` has it, or elsewhere.

Three places of SE, each with its convolution compiled by Inductor with freezing, in channels_last:

    residual    1x1 convolution, scale, sum with the shortcut, ReLU: the map is scaled, or the convolution's weights (batch 1)
    activation  convolution, scale, ReLU: no scale, a pass that scales, or oneDNN's binary post-op, which scales while the
                convolution writes. Inductor has no such fusion: a pass over its graph puts the operator there
    next        depthwise convolution, SiLU, scale, 1x1 convolution: the map is scaled, or the second convolution's weights,
                as a convolution or as a matrix product (batch 1)

Each round times all forms of a row, in changing order; ratios are medians of the rounds' ratios to the first form, with their
quartiles. Above 1, the first form is faster.

    python examples/benchmarks/scales.py
    python examples/benchmarks/scales.py --places activation --bf16
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from tqdm import tqdm

from se_fx.measure import Row

Compute = Callable[[nn.Conv2d, Tensor, Tensor, Tensor], Tensor]  # of a convolution, its input, the gate and the shortcut


class Form(nn.Module):
    """A convolution, what comes before it, and what is computed with it."""

    def __init__(self, before: nn.Module, conv: nn.Conv2d, compute: Compute) -> None:
        super().__init__()
        self.before, self.conv, self.compute = before, conv, compute

    def forward(self, x: Tensor, gate: Tensor, shortcut: Tensor) -> Tensor:
        return self.compute(self.conv, self.before(x), gate, shortcut)


# ------------------------------------------------------------------------------------------------------------------ forms
def own_weights(conv: nn.Conv2d, x: Tensor, gate: Tensor, shortcut: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, conv.weight * gate[0][..., None], conv.bias * gate[0, :, 0, 0]) + shortcut)


def matrix_product(conv: nn.Conv2d, x: Tensor, gate: Tensor, _: Tensor) -> Tensor:
    _, channels, height, width = x.shape
    matrix = conv.weight[..., 0, 0] * gate.reshape(1, -1)
    product = torch.addmm(conv.bias, x.permute(0, 2, 3, 1).reshape(-1, channels), matrix.t())
    return product.reshape(1, height, width, -1).permute(0, 3, 1, 2)


PLACES: dict[str, dict[str, Compute]] = {
    "residual": {"map": lambda conv, x, gate, shortcut: F.relu(conv(x) * gate + shortcut), "weights": own_weights},
    "activation": {
        "no scale": lambda conv, x, gate, _: F.relu(conv(x)),
        "pass": lambda conv, x, gate, _: F.relu(conv(x) * gate),
        "post-op": lambda conv, x, gate, _: F.relu(conv(x) * gate),
    },
    "next": {
        "map": lambda conv, x, gate, _: conv(x * gate),
        "weights": lambda conv, x, gate, _: F.conv2d(x, conv.weight * gate.reshape(1, -1, 1, 1), conv.bias),
        "matrix product": matrix_product,
    },
}
#: Channels in and out, the kernel's size, the map's: of ResNet-50; and of EfficientNet-B0 and MobileNetV3-large.
RESNET = [(64, 256, 1, 56), (128, 512, 1, 28), (256, 1024, 1, 14), (512, 2048, 1, 7)]
INNER = [(64, 64, 3, 56), (128, 128, 3, 28), (256, 256, 3, 14), (512, 512, 3, 7)]
INVERTED = [
    *((32, 16, 1, 112), (96, 24, 1, 56), (144, 40, 1, 28), (240, 80, 1, 14), (480, 112, 1, 14), (672, 192, 1, 7)),
    *((1152, 320, 1, 7), (72, 40, 1, 28), (120, 40, 1, 28), (960, 160, 1, 7)),
]
ROWS = {
    "residual": [(shape, 1) for shape in RESNET],
    "activation": [(shape, batch_size) for batch_size in (1, 8) for shape in (*RESNET, *INNER)],
    "next": [(shape, 1) for shape in INVERTED],
}


# ---------------------------------------------------------------------------------------------------------------- post-op
class PostOp(CustomGraphPass):
    """Has the packed convolution scale what it writes, and apply the ReLU that follows."""

    def uuid(self) -> str:
        return "scales.py: post-op"

    def __call__(self, graph: fx.Graph) -> None:
        conv = torch.ops.mkldnn._convolution_pointwise
        for relu in graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            product = relu.args[0]
            if product.target is torch.ops.aten.mul.Tensor and product.args[0].target is conv.default:
                source, gate = product.args
                with graph.inserting_before(relu):
                    x, *others = source.args[:7]
                    new = graph.call_function(conv.binary, (x, gate, *others, "mul", 1.0, "relu", [], ""))
                new.meta.update(relu.meta)
                relu.replace_all_uses_with(new)
                for node in (relu, product, source):
                    graph.erase_node(node)
                return
        raise SystemExit("Inductor packed no convolution: is this a CPU that oneDNN has kernels for?")


@torch.library.register_fake("mkldnn::_convolution_pointwise.binary")
def _(x: Tensor, gate: Tensor, *arguments: object) -> Tensor:  # strides are 1, padding keeps the size
    shape = (x.shape[0], gate.shape[1], *x.shape[2:])
    return x.new_empty(shape).to(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------------------------------- measuring
def prepared(place: str, shape: tuple[int, int, int, int], batch_size: int, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    """The forms of one row, compiled; they agree."""
    channels, out_channels, kernel_size, size = shape
    scaled = channels if place == "next" else out_channels
    shapes = [(batch_size, channels, size, size), (batch_size, scaled, 1, 1), (batch_size, out_channels, size, size)]
    inputs = [torch.rand(each, dtype=dtype).contiguous(memory_format=torch.channels_last) for each in shapes]
    conv = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2)
    before = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.SiLU())
    torch.compiler.reset()
    forms, outputs = [], []
    for name, compute in PLACES[place].items():
        form = Form(before if place == "next" else nn.Identity(), conv, compute).eval()
        options = {"post_grad_custom_pre_pass": PostOp()} if name == "post-op" else {}
        compiled = torch.compile(form.to(dtype, memory_format=torch.channels_last), dynamic=False, options=options)
        for _ in range(3):
            output = compiled(*inputs)
        outputs += [output] if name != "no scale" else []
        forms.append(lambda compiled=compiled: compiled(*inputs))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=2e-2, atol=2e-2)
    return forms


def timed(form: Callable[[], Tensor], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        form()
    return (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES), help="default: all three")
    parser.add_argument("--bf16", action="store_true", help="in bfloat16 instead of float32")
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="timings of each form (default: 25)")
    parser.add_argument("--min-seconds", type=float, default=0.05, metavar="S", help="the least a timing lasts (default: 0.05)")
    arguments = parser.parse_args()

    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        for place in arguments.places:
            rows = []
            for shape, batch_size in tqdm(ROWS[place], desc=place, unit="row"):
                forms = prepared(place, shape, batch_size, dtype)
                calls = [max(1, round(arguments.min_seconds / timed(form, 3))) for form in forms]
                rounds = []
                for _ in range(arguments.rounds):
                    order = random.sample(range(len(forms)), len(forms))
                    times = {position: timed(forms[position], calls[position]) for position in order}
                    rounds.append([times[position] for position in range(len(forms))])
                first, *others = (Row(place, "compiled", batch_size, seconds, (), 0) for seconds in zip(*rounds, strict=True))
                channels, out_channels, kernel_size, size = shape
                name = f"{kernel_size}x{kernel_size}, {channels} to {out_channels}, {size}x{size}"
                ratios = [ratio(other.against(first)) for other in others]
                rows.append([name, batch_size, f"{1e6 * first.median:,.0f}", *ratios])
            first_name, *names = PLACES[place]
            headers = ["convolution, map", "batch", f"{first_name}, us", *(f"{name}, to {first_name}" for name in names)]
            print(f"\n## {place}, {'bfloat16' if arguments.bf16 else 'float32'}\n")
            print(tabulate(rows, headers, "github", disable_numparse=True, colalign=["left", *["right"] * (len(headers) - 1)]))


def ratio(row: Row) -> str:
    low, high = row.ratio_iqr
    return f"{row.ratio:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
