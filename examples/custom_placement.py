"""Where blocks go, by a policy of one's own.

A policy is a function from a graph, and the module its names refer to, to spots: values of the graph that may be scaled, each
with its channels and the Conv2d that its block is named after. Four ways to say where, from the shortest to the freest:

  strided        no policy at all: `where`, a predicate on convs, or glob patterns of their names
  depthwise      one of se_fx's policies, of whose spots some are kept, by the module
  stage_ends     likewise, by their order: after the last residual unit of each stage
  concatenated   from the graph itself: on values that several branches of convs are concatenated to

For each, on a network that has such places: the plan, what it adds, identity-initialised blocks that leave the outputs bitwise
as they were, and the plan as JSON, read again and replayed on a fresh network.

    python examples/custom_placement.py
    python examples/custom_placement.py stage_ends --model timm:regnety_008 --report
    python examples/custom_placement.py concatenated --model googlenet --save plan.json
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import se_fx
from se_fx.analysis import channels
from se_fx.loading import load_model
from se_fx.placement import PLACEMENTS, Spot, norm, post


# ---------------------------------------------------------------------------------------------------------------- policies
def depthwise(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """After the norms of depthwise convs alone: where EfficientNets have their blocks."""
    for spot in norm(graph, root):
        if root.get_submodule(spot.conv).groups == spot.channels > 1:
            yield spot


def stage_ends(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """After the last residual unit of each stage: the last of as many channels."""
    for _, stage in itertools.groupby(post(graph, root), key=lambda spot: spot.channels):
        *_, last = stage
        yield last


def concatenated(graph: fx.Graph, root: nn.Module) -> Iterator[Spot]:
    """On values that branches are concatenated to along channels, so that one gate sees them all."""
    widths = channels(graph, root)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.cat and node in widths:
            branches = node.all_input_nodes
            conv = conv_before(branches[-1], root)
            if conv and len(branches) > 1 and widths[node] == sum(widths.get(branch, 0) for branch in branches):
                yield Spot(conv, widths[node], (node,))


def conv_before(node: fx.Node, root: nn.Module) -> str:
    """The conv that a value comes from, by modules and functions of one input; "" for none."""
    while len(node.all_input_nodes) == 1:
        if node.op == "call_module" and isinstance(root.get_submodule(node.target), nn.Conv2d):
            return node.target
        (node,) = node.all_input_nodes
    return ""


# In the table, policies go by name: a plan that was saved with them finds them in another process.
PLACEMENTS.update({policy.__name__: policy for policy in (depthwise, stage_ends, concatenated)})

EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {  # a network that has such places, and the options of transform
    "strided": ("resnet18", {"where": lambda name, conv: conv.stride != (1, 1) and conv.kernel_size != (1, 1)}),
    "depthwise": ("mobilenet_v2", {"placement": "depthwise"}),
    "stage_ends": ("resnet50", {"placement": "stage_ends"}),
    "concatenated": ("squeezenet1_1", {"placement": "concatenated"}),
}


# --------------------------------------------------------------------------------------------------------------------- main
def show(name: str, arguments: argparse.Namespace) -> se_fx.Report:
    """Plan, insert, compare, save and replay."""
    usual, options = EXAMPLES[name]
    spec = arguments.model or usual
    torch.manual_seed(0)
    model = load_model(spec, meta=False).to(arguments.device).eval()
    example = torch.rand(2, 3, arguments.size, arguments.size, device=arguments.device)
    chosen = se_fx.plan(model, example_inputs=example[:1], min_channels=1, latent_channels=1 / 16, init="identity", **options)
    print(f"{name}, {spec}: {chosen}")
    gm = se_fx.transform(model, chosen, seed=0)
    report = se_fx.report(gm, example_inputs=example[:1])
    if arguments.report:
        print(f"\n{report}\n")
    added, base = report.added, report.base
    print(f"adds {added.params / base.params:.2%} parameters, {added.flops / base.flops:.2%} FLOPs, ", end="")
    print(f"{added.bytes / base.bytes:.2%} bytes moved")

    with torch.no_grad():
        before, after = model(example), gm(example)
    assert torch.equal(before, after)
    saved = json.dumps(chosen.to_dict(), indent=2)
    if arguments.save:
        Path(arguments.save).write_text(saved, encoding="utf-8")
    fresh = load_model(spec, meta=False).to(arguments.device).eval()
    again = se_fx.transform(fresh, se_fx.Plan.from_dict(json.loads(saved)))
    again.load_state_dict(gm.state_dict())
    with torch.no_grad():
        replayed = again(example)
    assert torch.equal(replayed, after)
    print(f"outputs bitwise equal to the original's; {len(saved):,} characters of JSON gave the same network again\n")
    return report


def main(words: Sequence[str] | None = None) -> dict[str, se_fx.Report]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(EXAMPLES)} (default: all)")
    parser.add_argument("--model", metavar="NAME", help="a torchvision model or timm:NAME (default: one for each way)")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="height and width of images (default: 64)")
    parser.add_argument("--report", action="store_true", help="print the whole report")
    parser.add_argument("--save", metavar="FILE", help="write the plan there as JSON, the last one's if several")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="such as cpu or cuda (default: cpu)")
    arguments = parser.parse_args(words)
    unknown = [way for way in arguments.ways if way not in EXAMPLES]
    if unknown:
        parser.error(f"WAY {unknown[0]}: expected one of {', '.join(EXAMPLES)}")
    return {name: show(name, arguments) for name in arguments.ways or EXAMPLES}


if __name__ == "__main__":
    main()
