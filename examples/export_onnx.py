"""A network with Squeeze-and-Excitation, as ONNX, for onnxruntime.

EfficientNet-Lite0 with its real ImageNet weights gets the blocks back that were taken out of it for mobile. They start as exact
identities, and learn for a moment on scikit-image's photos. Then the network as it was, the one with blocks, and the one with
blocks optimised for inference are exported with a dynamic batch, checked, run by onnxruntime, compared with PyTorch, and timed
side by side. Needs ONNX: pip install -e '.[examples,onnx]'

    python examples/export_onnx.py --output exported       keep the files
    python examples/export_onnx.py --steps 0               blocks that never learned: optimising removes them
    python examples/export_onnx.py --init default          gates start near 0.5: the network has to be trained again
    python examples/export_onnx.py --model resnet18        another network of torchvision's, with random weights
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import torchvision
from quickstart import OPTIONS, PHOTOS, photo, pretrained, train_new_parameters
from tabulate import tabulate
from torch import Tensor, nn

import se_fx
from se_fx.measure.progress import progress_bar

LITE0 = "efficientnet-lite0"


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and where its blocks go."""
    if name == LITE0:
        return pretrained(), OPTIONS
    return torchvision.models.get_model(name), {"placement": "residual", "min_channels": 1, "latent_channels": 1 / 16}


def export(model: nn.Module, images: Tensor, path: Path) -> onnxruntime.InferenceSession:
    """Write an ONNX file that takes any number of images, check it, and load it."""
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own, about itself
        torch.onnx.export(model, (images[:2],), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
    onnx.checker.check_model(path, full_check=True)
    return onnxruntime.InferenceSession(path)


def run(session: onnxruntime.InferenceSession, images: Tensor) -> Tensor:
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(output)


def latencies(sessions: Mapping[str, onnxruntime.InferenceSession], image: Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of calls: each round calls every session, in turn the first, so that what slows one slows all."""
    names, times = list(sessions), {name: [] for name in sessions}
    with progress_bar("timing", "round", rounds, shown=True) as step:
        for round_ in range(-2, rounds):  # two to warm up
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                run(sessions[name], image)
                times[name].append(1e3 * (time.perf_counter() - start))
            if round_ >= 0:
                step()
    return {name: each[2:] for name, each in times.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=LITE0, metavar="NAME", help=f"of torchvision (default: {LITE0}, pretrained)")
    parser.add_argument("--init", choices=["identity", "default"], default="identity", help="of the blocks (default: identity)")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps the blocks learn before (default: 4)")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="timings of each network (default: 30)")
    parser.add_argument(
        "--optimize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also export what se_fx.optimize_for_inference makes of it (default: yes)",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the files go (default: they are not kept)")
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    original, options = build(arguments.model)
    images = torch.cat([photo(name) for name in PHOTOS])
    original.eval()
    model = se_fx.transform(original, init=arguments.init, **options)
    print(f"{len(se_fx.report(model).sites)} blocks; {arguments.steps} steps of training them:")
    train_new_parameters(model, images, torch.tensor([label for label, _ in PHOTOS.values()]), arguments.steps)
    models = {"plain": original, "SE": model}
    if arguments.optimize:
        models["SE, optimised"] = se_fx.optimize_for_inference(model)
        print(f"\n{se_fx.report(models['SE, optimised'])}\n")

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sessions, sizes = {}, {}
        for name, each in models.items():
            start = time.perf_counter()
            path = folder / f"{name.replace(', ', '-').lower()}.onnx"
            sessions[name], sizes[name] = export(each, images, path), path.stat().st_size
            print(f"exported and checked {path.name} in {time.perf_counter() - start:.0f} s", flush=True)

        times, rows = latencies(sessions, images[:1], arguments.rounds), []
        for name, session in sessions.items():
            with torch.no_grad():
                expected = models[name](images)
            found = run(session, images)  # three images; it was exported with two
            difference, same = float((found - expected).abs().max()), torch.equal(found.argmax(1), expected.argmax(1))
            assert same, f"{name}: onnxruntime sees other classes than PyTorch"
            assert difference < 1e-3 * float(expected.abs().max()), f"{name}: outputs are {difference} apart"
            classes = ", ".join(str(int(label)) for label in found.argmax(1))
            ratio = statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True))
            row = [name, f"{sizes[name] / 2**20:.2f}", f"{difference:.1e}", classes]
            rows.append([*row, f"{statistics.median(times[name]):.2f}", f"{ratio:.3f}"])
    headers = ["network", "MiB", "largest difference", "top-1 classes", "latency, ms", "to plain"]
    align = ["left", *["right"] * 5]
    print(f"\nonnxruntime {onnxruntime.__version__} beside PyTorch on {', '.join(PHOTOS)}; latency at batch 1, medians")
    print(tabulate(rows, headers, disable_numparse=True, colalign=align))


if __name__ == "__main__":
    main()
