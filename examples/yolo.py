"""Squeeze-and-Excitation in YOLO: trained, validated, fused, exported, trained further. What fusing changes is shown.

Eight images of drawn shapes are learnt by heart. Ultralytics builds the network in its trainer, so the blocks go in there; it
folds norms into convolutions (`fuse`) whenever it validates, predicts or exports, so they go outside of its `Conv`. Nothing is
downloaded.

    pip install ultralytics onnx onnxruntime
    python examples/yolo.py
    python examples/yolo.py --models yolov8n yolo11n yolo26n --placements activation residual --ways in-place transform
    python examples/yolo.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
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


def train(model: str, data: Path, options: dict[str, Any], trainer: type[DetectionTrainer] = SETrainer) -> Path:
    """The weights after training."""
    yolo = YOLO(model)
    still = {
        "mosaic": 0.0,
        "translate": 0.0,
        "scale": 0.0,
        "fliplr": 0.0,
        "hsv_h": 0.0,
        "hsv_s": 0.0,
        "hsv_v": 0.0,
        "erasing": 0.0,
    }
    yolo.train(data=str(data), trainer=trainer, project=str(data.parent), **still, **options)
    return Path(yolo.trainer.last)


def mean_average_precision(weights: Path, data: Path, size: int, *, fused: bool) -> float:
    """mAP50-95 on the images, by Ultralytics' own validation, which fuses, or is kept from it."""
    unfused = mock.patch.object(BaseModel, "fuse", lambda self, *args, **kwargs: self)
    with contextlib.nullcontext() if fused else unfused:
        result = YOLO(weights).val(data=str(data), imgsz=size, plots=False, verbose=False, project=str(data.parent))
    return float(result.box.map)


def raw(network: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = network(x)
    return found[0] if isinstance(found, (list, tuple)) else found


def fused_off(weights: Path, size: int) -> float:
    """How far raw outputs are from those before `fuse`, of the largest value."""
    network, x = YOLO(weights).model.float().eval(), torch.rand(2, 3, size, size)
    before = raw(network, x).clone()
    return float((raw(network.fuse(verbose=False), x) - before).abs().max() / before.abs().max())


def exported_off(weights: Path, size: int) -> float:
    """How far ONNX Runtime's outputs are from the network's, of the largest value."""
    import onnxruntime

    yolo, x = YOLO(weights), torch.rand(1, 3, size, size)
    expected = raw(yolo.model.float().eval(), x)
    file = yolo.export(format="onnx", imgsz=size, simplify=False)
    session = onnxruntime.InferenceSession(str(file))
    (found, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())


def refused(model: str, data: Path, size: int, options: dict[str, Any]) -> str:
    """What a network says that can't be fused, at the end of training if not before."""
    try:
        fused_off(train(model, data, options), size)
    except se_fx.SqueezeExciteError as error:
        return str(error)
    raise AssertionError("a block between convolution and norm was fused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["yolov8n"], metavar="NAME", help="of Ultralytics (default: yolov8n)")
    parser.add_argument("--placements", nargs="+", default=["activation"], choices=["activation", "residual"])
    parser.add_argument("--ways", nargs="+", default=["in-place"], choices=["in-place", "transform"])
    parser.add_argument("--epochs", type=int, default=100, help="of training (default: 100)")
    parser.add_argument("--size", type=int, default=96, metavar="PIXELS", help="height and width of images (default: 96)")
    parser.add_argument("--quick", action="store_true", help="few epochs, to see that it works")
    arguments = parser.parse_args()
    epochs, size = 3 if arguments.quick else arguments.epochs, arguments.size
    options = {"epochs": epochs, "imgsz": size, "batch": 8, "device": "cpu", "workers": 0, "amp": False, "plots": False}
    options |= {"val": False, "verbose": False, "optimizer": "AdamW", "lr0": 0.002, "nbs": 8, "warmup_epochs": 3, "seed": 0}

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = draw(Path(folder), size)
        for name in arguments.models:
            for SETrainer.way in arguments.ways:
                for SETrainer.placement in arguments.placements:
                    weights = train(f"{name}.yaml", data, options)
                    before, after = (mean_average_precision(weights, data, size, fused=fused) for fused in (False, True))
                    off = fused_off(weights, size), exported_off(weights, size)
                    blocks = len(se_fx.blocks_of(YOLO(weights).model))
                    row = [
                        name,
                        SETrainer.way,
                        SETrainer.placement,
                        blocks,
                        f"{before:.4f}",
                        f"{after:.4f}",
                        *(f"{o:.0e}" for o in off),
                    ]
                    rows.append(row)
                    print(*row, flush=True)
        headers = ["model", "blocks go in", "placement", "blocks", "mAP50-95", "fused", "outputs, fused", "by ONNX Runtime"]
        print(tabulate(rows, headers, disable_numparse=True))

        further = [sys.executable, __file__, "--further", str(weights), str(data), str(size)]
        print(
            "trained further in a new process:",
            subprocess.run(further, check=True, capture_output=True, text=True).stdout.strip(),
        )
        SETrainer.way, SETrainer.placement = "in-place", "conv"
        print('placement="conv":', refused(f"{arguments.models[0]}.yaml", data, size, options | {"epochs": 1}))


def further(weights: str, data: str, size: str) -> None:
    """Trains `weights` for another epoch, as another script would."""
    with contextlib.redirect_stdout(io.StringIO()):
        options = {
            "epochs": 1,
            "imgsz": int(size),
            "batch": 8,
            "device": "cpu",
            "workers": 0,
            "amp": False,
            "plots": False,
            "val": False,
        }
        last = train(weights, Path(data), options)
    print(len(se_fx.blocks_of(YOLO(last).model)), "blocks")


if __name__ == "__main__":
    further(*sys.argv[2:]) if sys.argv[1:2] == ["--further"] else main()
