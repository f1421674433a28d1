"""Squeeze-and-Excitation in a detector, whose code no tracer takes whole.

torchvision's Faster R-CNN (MobileNetV3 with a feature pyramid) gets a block at the end of each residual branch of its backbone.
It runs its own code, and so keeps its class, its losses and its lists of images; the backbone inside it is one graph. Without
any pretrained weights it learns to find handwritten digits, scikit-learn's, that lie at known places on scikit-image's photos.
Then it detects digits it has not seen on a photo it has not seen, and its backbone is compiled as one graph.

    python examples/detection.py --steps 20           a first look: the loss falls, nothing is found yet
    python examples/detection.py --backend inductor   compile for speed, which takes a minute more
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from skimage import data
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import (
    FasterRCNN,
    FastRCNNPredictor,
    TwoMLPHead,
    fasterrcnn_mobilenet_v3_large_320_fpn,
)
from torchvision.ops import box_iou

import se_fx
from se_fx.measure.progress import progress_bar

Sample = tuple[Tensor, dict[str, Tensor]]
PHOTOS = {True: ("chelsea", "coffee", "astronaut"), False: ("rocket",)}  # by whether to train with them


class Scenes:
    """Digits on photos: images of different sizes (3, H, W) in [0, 1], boxes (n, 4) in pixels, labels (n,) of 1.

    Training and evaluation have no digit and no photo in common.
    """

    def __init__(self, training: bool) -> None:
        kept = slice(0, 1200) if training else slice(1200, None)
        self.digits = torch.from_numpy(load_digits().images[kept]).float() / 16
        photos = [torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1).float() / 255 for name in PHOTOS[training]]
        self.photos = [F.avg_pool2d(photo, 2) for photo in photos]
        self.generator = torch.Generator().manual_seed(int(training))

    def batch(self, size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        images, targets = zip(*(self.sample() for _ in range(size)), strict=True)
        return list(images), list(targets)

    def sample(self) -> Sample:
        """A crop of a photo, darkened, with a bright digit in its left half and one in its right half."""
        photo = self.photos[self._between(0, len(self.photos))]
        height, width = self._between(64, 97), self._between(112, 145)
        top, left = self._between(0, photo.shape[1] - height + 1), self._between(0, photo.shape[2] - width + 1)
        image, boxes = photo[:, top : top + height, left : left + width] * 0.5, []
        for half in range(2):
            chosen, side = self._between(0, len(self.digits)), self._between(36, 53)
            digit = F.interpolate(self.digits[chosen][None, None], size=(side, side), mode="bilinear")[0, 0]
            y, x = self._between(0, height - side + 1), half * (width // 2) + self._between(0, width // 2 - side + 1)
            place = image[:, y : y + side, x : x + side]
            place.copy_(torch.maximum(place, digit))
            rows, columns = (digit > 0.2).any(1).nonzero(), (digit > 0.2).any(0).nonzero()  # where there is ink
            ends = [x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1]
            boxes.append([float(end) for end in ends])
        return image, {"boxes": torch.tensor(boxes), "labels": torch.ones(2, dtype=torch.long)}

    def _between(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))


def detector_of_few() -> FasterRCNN:
    """A small Faster R-CNN for digits, of which few are in an image."""
    few = {"box_batch_size_per_image": 32, "rpn_post_nms_top_n_train": 200, "rpn_post_nms_top_n_test": 100}
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=96, max_size=160, box_detections_per_img=10, **few
    )
    detector.roi_heads.box_head = TwoMLPHead(256 * 7 * 7, 128)
    detector.roi_heads.box_predictor = FastRCNNPredictor(128, 2)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # MobileNetV3's 0.01 is for thousands of steps
    return detector


def train(model: nn.Module, scenes: Scenes, steps: int, batch_size: int) -> tuple[float, float]:
    """Steps of AdamW. Returns the mean loss of the first and of the last tenth of them."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    losses: list[float] = []
    tenth = max(steps // 10, 1)
    with progress_bar("training", "step", steps, shown=True) as advance:
        for step in range(steps):
            parts = model(*scenes.batch(batch_size))
            loss = sum(parts.values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            advance()
            if (step + 1) % tenth == 0:
                print(f"  step {step + 1}: loss {sum(losses[-tenth:]) / tenth:.3f}", flush=True)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


@torch.no_grad()
def evaluate(model: nn.Module, scenes: Scenes, count: int, least_score: float = 0.5) -> str:
    """How many digits have a detection with IoU above 0.5, how many detections have a digit, and how well these overlap."""
    digits = detections = 0
    overlaps: list[float] = []
    images, targets = scenes.batch(count)
    for result, target in zip(model.eval()(images), targets, strict=True):
        boxes = result["boxes"][result["scores"] > least_score]
        digits, detections = digits + len(target["boxes"]), detections + len(boxes)
        best = box_iou(target["boxes"], boxes).max(1).values if len(boxes) else torch.zeros(0)
        overlaps += best[best > 0.5].tolist()
    recall, precision = len(overlaps) / digits, len(overlaps) / max(detections, 1)
    overlap = f"{sum(overlaps) / len(overlaps):.2f}" if overlaps else "undefined"
    return (
        f"{digits} digits in {count} unseen images, {detections} detections with a score above {least_score}:\n"
        f"recall at IoU 0.5 {recall:.1%}, precision {precision:.1%}, mean IoU of those found {overlap}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="steps of training (default: 150)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="images in a step (default: 4)")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="images to evaluate with (default: 100)")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile (default: aot_eager, which is soon done)")
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    model = se_fx.transform(detector_of_few(), placement="residual", min_channels=1, latent_channels=1 / 4, init="identity")
    assert isinstance(model, FasterRCNN)
    training, held_out = Scenes(training=True), Scenes(training=False)
    print(se_fx.report(model.eval(), example_inputs=(training.batch(1)[0],)), end="\n\n")

    print(f"training with {len(training.digits)} digits on {', '.join(PHOTOS[True])}:")
    start = time.perf_counter()
    first, last = train(model, training, arguments.steps, arguments.batch_size)
    assert last < first, f"the loss did not fall: {first} to {last}"
    print(f"{time.perf_counter() - start:.0f} s; the loss fell from {first:.2f} to {last:.2f}\n")
    print(evaluate(model, held_out, arguments.images), end="\n\n")

    images = model.transform(held_out.batch(2)[0])[0].tensors
    compiled = torch.compile(model.backbone, fullgraph=True, backend=arguments.backend)
    start = time.perf_counter()
    with torch.no_grad():
        expected, found = model.backbone(images), compiled(images)
    difference = max(float((found[level] - expected[level]).abs().max()) for level in expected)
    assert difference < 1e-3, difference
    print(f"backbone compiled as one graph in {time.perf_counter() - start:.0f} s; largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
