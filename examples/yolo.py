"""Squeeze-and-Excitation in YOLO: trained, validated, fused, exported, trained further. What fusing changes is shown.

Eight images of drawn shapes are learnt by heart. Ultralytics builds the network in its trainer, so the blocks go in there; it
folds norms into convolutions (`fuse`) whenever it validates, predicts or exports, so they go outside of its `Conv`. Nothing is
downloaded.

    pip install -e ".[ultralytics]"
    python examples/yolo.py
    python examples/yolo.py --models yolov8n yolo11n yolo26n --placements activation residual --ways in-place transform
    python examples/yolo.py --quick
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw
from tabulate import tabulate
from torch import nn

import se_fx

os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
os.environ.setdefault("YOLO_VERBOSE", "false")

from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import BaseModel

HEADERS = ["model", "blocks go in", "placement", "blocks", "mAP50-95", "fused", "without blocks", "outputs, fused", "ONNX"]
#: On a CPU, nothing written but weights, and no image changed: they are to be learnt by heart.
STILL = {"device": "cpu", "workers": 0, "amp": False, "plots": False, "val": False, "verbose": False, "seed": 0}
STILL |= dict.fromkeys(["mosaic", "translate", "scale", "fliplr", "hsv_h", "hsv_s", "hsv_v", "erasing"], 0.0)
SCHEDULE = {"batch": 2, "nbs": 2, "optimizer": "AdamW", "lr0": 0.002, "warmup_epochs": 1}


class SETrainer(DetectionTrainer):
    """Puts blocks into the network that it builds, before weights are loaded."""

    placement, way = "activation", "in-place"

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        model: Any = super().get_model(cfg, None, verbose)
        options: Any = {"latent_channels": 1 / 8, "min_channels": 16, "placement": self.placement, "init": "identity"}
        if self.way == "transform":
            model = se_fx.transform(model, **options)
        else:
            se_fx.apply_squeeze_excite(model, **options)
        if weights:
            model.load(weights)
        return model


def draw(folder: Path, size: int, count: int = 8) -> Path:
    """Images of rectangles and discs, with their boxes in YOLO's format."""
    generator = np.random.default_rng(0)
    for each in ("images", "labels"):
        (folder / each).mkdir()
    for index in range(count):
        picture = Image.new("RGB", (size, size), tuple(generator.integers(0, 80, 3).tolist()))
        lines = []
        for _ in range(3):
            kind, width, height = generator.integers(0, 2), *generator.uniform(0.2, 0.45, 2)
            x, y = generator.uniform(width / 2, 1 - width / 2), generator.uniform(height / 2, 1 - height / 2)
            box = [size * v for v in (x - width / 2, y - height / 2, x + width / 2, y + height / 2)]
            pen = ImageDraw.Draw(picture)
            (pen.ellipse if kind else pen.rectangle)(box, fill=tuple(generator.integers(120, 255, 3).tolist()))
            lines.append(f"{kind} {x:.6f} {y:.6f} {width:.6f} {height:.6f}")
        picture.save(folder / "images" / f"{index}.png")
        (folder / "labels" / f"{index}.txt").write_text("\n".join(lines))
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [rectangle, disc]\n")
    return data


def drawn(data: Path, count: int) -> torch.Tensor:
    """The first images, as the network has them: (N, 3, H, W)."""
    files = sorted((data.parent / "images").glob("*.png"))[:count]
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 for file in files])


def train(model: str, data: Path, **options: Any) -> Path:
    """The weights after training."""
    yolo = YOLO(model)
    yolo.train(data=str(data), trainer=SETrainer, project=str(data.parent), **STILL, **SCHEDULE, **options)
    return Path(yolo.trainer.last)


def mean_average_precision(weights: Path, data: Path, size: int, fuse: Callable[..., Any] = BaseModel.fuse) -> float:
    """mAP50-95 on the images, by Ultralytics' own validation, with something else in place of its `fuse`."""
    with mock.patch.object(BaseModel, "fuse", fuse):
        result = YOLO(weights).val(data=str(data), imgsz=size, plots=False, verbose=False, project=str(data.parent))
    return float(result.box.map)


def unfused(network: nn.Module, **_: Any) -> nn.Module:
    return network


def without_blocks(network: nn.Module, **_: Any) -> nn.Module:
    return se_fx.remove(network)


def raw(network: Any, x: torch.Tensor) -> torch.Tensor:
    """Boxes and scores of all anchors, (N, 4 + classes, anchors)."""
    with torch.no_grad():
        found = network(x)
    return found[0].clone()


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, of the largest value of the same coordinate or class."""
    return float(((found - expected).abs().amax((0, 2)) / expected.abs().amax((0, 2))).max())


def fused_apart(weights: Path, data: Path) -> float:
    """How far raw outputs are from those before `fuse`."""
    network, x = YOLO(weights).model.float().eval(), drawn(data, 8)
    before = raw(network, x)
    fused = network.fuse(verbose=False)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert norms == 0, f"{norms} norms are left: nothing was compared"
    return apart(raw(fused, x), before)


def exported_apart(weights: Path, data: Path, size: int) -> float:
    """How far ONNX Runtime's outputs are from the network's."""
    import onnxruntime

    yolo, x = YOLO(weights), drawn(data, 1)
    expected = raw(yolo.model.float().eval(), x)
    ends = {"end2end": False} if getattr(yolo.model, "end2end", False) else {}  # of all anchors, not of the best alone
    file = yolo.export(format="onnx", imgsz=size, simplify=False, **ends)
    session = onnxruntime.InferenceSession(str(file))
    (found, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return apart(torch.from_numpy(found), expected)


def refused(model: str, data: Path, **options: Any) -> str:
    """What a network says that can't be fused, at the end of training if not before."""
    try:
        fused_apart(train(model, data, **options), data)
    except se_fx.SqueezeExciteError as error:
        return str(error)
    raise AssertionError("a block between convolution and norm was fused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["yolov8n"], metavar="NAME", help="of Ultralytics (default: yolov8n)")
    parser.add_argument("--placements", nargs="+", default=["activation"], choices=["activation", "residual"])
    parser.add_argument("--ways", nargs="+", default=["in-place"], choices=["in-place", "transform"])
    parser.add_argument("--epochs", type=int, default=40, help="of training, four steps each (default: 40)")
    parser.add_argument("--size", type=int, default=96, metavar="PIXELS", help="height and width of images (default: 96)")
    parser.add_argument("--quick", action="store_true", help="fewer epochs, smaller images: enough to learn something")
    arguments = parser.parse_args()
    epochs, size = (30, 64) if arguments.quick else (arguments.epochs, arguments.size)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = draw(Path(folder), size)
        for name in arguments.models:
            for SETrainer.way in arguments.ways:
                for SETrainer.placement in arguments.placements:
                    weights = train(f"{name}.yaml", data, epochs=epochs, imgsz=size)
                    ways = {"fuse": unfused}, {}, {"fuse": without_blocks}
                    before, after, without = (mean_average_precision(weights, data, size, **way) for way in ways)
                    off = fused_apart(weights, data), exported_apart(weights, data, size)
                    blocks = len(se_fx.blocks_of(YOLO(weights).model))
                    figures = (*(f"{m:.4f}" for m in (before, after, without)), *(f"{o:.0e}" for o in off))
                    rows.append([name, SETrainer.way, SETrainer.placement, blocks, *figures])
                    print(*rows[-1], flush=True)
        print(tabulate(rows, HEADERS, disable_numparse=True))
        for name, way, placement, _, before, after, *_ in rows:
            where = f"{name}, {way}, {placement}"
            assert abs(float(before) - float(after)) <= 0.005, f"{where}: fusing changes accuracy"
            assert float(before) > 0.1, f"{where}: nothing was learnt, so nothing was compared; train for more --epochs"

        further = [sys.executable, __file__, "--further", str(weights), str(data), str(size)]
        done = subprocess.run(further, check=True, capture_output=True, text=True)
        print("trained further in a new process:", done.stdout.splitlines()[-1])
        SETrainer.way, SETrainer.placement = "in-place", "conv"
        print('placement="conv":', refused(f"{arguments.models[0]}.yaml", data, epochs=1, imgsz=size))


def further(weights: str, data: str, size: str) -> None:
    """Trains `weights` for another epoch, as another script would."""
    last = train(weights, Path(data), epochs=1, imgsz=int(size))
    print(len(se_fx.blocks_of(YOLO(last).model)), "blocks")


if __name__ == "__main__":
    further(*sys.argv[2:]) if sys.argv[1:2] == ["--further"] else main()
