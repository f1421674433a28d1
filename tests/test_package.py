"""What is installed: it needs torch, networkx and tabulate alone, and says which version it is."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import se_fx

#: What the extras bring, and what comes with neither torch nor them.
OPTIONAL = (
    "numpy",
    "torchvision",
    "timm",
    "matplotlib",
    "tqdm",
    "PIL",
    "skimage",
    "sklearn",
    "lightning",
    "composer",
    "onnx",
    "safetensors",
)

WHOLE_PIPELINE = """
import torch
from torch import nn

import se_fx


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(x + nn.functional.dropout(self.norm(self.conv(x)).relu(), 0.1, self.training))


model = nn.Sequential(nn.Conv2d(3, 8, 3), Unit(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
x = torch.randn(2, 3, 8, 8)
rewritten = se_fx.transform(model, min_channels=8, latent_channels=2, placement="residual", example_inputs=x)
assert len(se_fx.Plan.of(rewritten)) == 1
print(se_fx.report(rewritten, x), se_fx.suggest(model), se_fx.plan(model, min_channels=8, example_inputs=x))
print(se_fx.report(rewritten, x).estimate(se_fx.measure_machine()))
profile = se_fx.profile_gates(rewritten, [x, x])
print(profile, se_fx.fold_gates(rewritten, profile, tolerance=0.5, held_out=[x]))
fast = se_fx.optimize_for_inference(rewritten, x)
torch.testing.assert_close(fast(x), rewritten(x))
print(se_fx.report(fast), se_fx.bench(rewritten, x, rounds=2))
se_fx.apply_squeeze_excite(model, min_channels=8)
"""


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)


def test_the_whole_pipeline_needs_no_optional_package_and_warns_of_nothing() -> None:
    block = f"import sys\nfor name in {OPTIONAL}:\n    sys.modules[name] = None\n"
    done = python(block + WHOLE_PIPELINE, "-W", "error", "-W", "ignore:Failed to initialize NumPy")  # PyTorch's own warning
    assert done.returncode == 0, done.stderr


def test_importing_se_fx_imports_no_optional_package() -> None:
    done = python(
        f"import sys, torch\nhad = set(sys.modules)\nimport se_fx\nprint(sorted((set(sys.modules) - had) & {set(OPTIONAL)}))"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_version_is_the_installed_one() -> None:
    assert se_fx.__version__ == importlib.metadata.version("se_fx")
