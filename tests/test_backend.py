"""`torch.compile(model, backend="se_fx")`: Inductor, behind the rewrites, on what Dynamo captures.

Where what comes after the rewrites doesn't matter, that is ATen's own kernels instead, which takes less time to compile.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves
from torchvision.ops import SqueezeExcitation
from trained import applied, assert_close, settled

import se_fx

pytestmark = pytest.mark.usefixtures("fresh_compiler")

FROZEN = {"freezing": True}


class Unit(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.se, self.back = SqueezeExcitation(32, 4), nn.Conv2d(32, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.back(self.se(self.norm(self.conv(x)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = nn.Conv2d(3, 8, 3), Unit()

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.stem(x)).mean((2, 3))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return settled(Net())


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 12, generator=torch.Generator().manual_seed(batch))


@pytest.fixture
def rewritten(caplog: pytest.LogCaptureFixture) -> Iterator[list[int]]:
    """In how many places each graph was rewritten, graph by graph."""

    class Noted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.INFO:
                found.append(record.args[1])  # type: ignore[index, arg-type]

    found: list[int] = []
    handler, logger = Noted(), logging.getLogger("se_fx")
    logger.addHandler(handler)
    with caplog.at_level(logging.DEBUG, logger="se_fx"):
        yield found
    logger.removeHandler(handler)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """ATen's kernels in the place of Inductor."""

    def eager(graph_module: fx.GraphModule, inputs: list[Any], config_patches: object) -> Any:
        return aot_eager(graph_module, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", eager)


FRESH = """
import sys, torch, torch._inductor.config as config
before = config.save_config()
assert "se_fx" in torch.compiler.list_backends() and "se_fx" not in sys.modules
import se_fx
assert config.save_config() == before
"""


def test_known_by_name_without_an_import_which_sets_nothing_global() -> None:
    subprocess.run([sys.executable, "-c", FRESH], check=True, cwd="/")


@pytest.mark.integration
@torch.no_grad()
def test_what_is_rewritten_is_what_optimising_rewrites(rewritten: list[int]) -> None:
    model = net()
    places = sum(applied(se_fx.optimize_for_inference(model, images())).values())
    compiled = torch.compile(model, backend="se_fx", options=FROZEN, fullgraph=True)
    for batch in (1, 2, 5):
        assert_close(compiled(images(batch)), model(images(batch)))
    assert set(rewritten) == {places}
    assert places >= 5


@pytest.mark.integration
@pytest.mark.parametrize("name", ["seresnet50", "efficientnet_b0"])
@torch.no_grad()
@pytest.mark.usefixtures("quick")
def test_networks_of_others(name: str, rewritten: list[int]) -> None:
    model, x = settled(timm.create_model(name)), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend="se_fx", options=FROZEN, fullgraph=True)
    assert_close(compiled(x), model(x))
    assert rewritten == [sum(applied(se_fx.optimize_for_inference(model, x)).values())]


@pytest.mark.integration
@torch.no_grad()
def test_inductors_own_setting_is_followed(rewritten: list[int]) -> None:
    model, x = net(), images()
    assert_close(torch.compile(model, backend="se_fx")(x), model(x))
    assert rewritten == []
    torch.compiler.reset()
    with torch._inductor.config.patch(freezing=True):
        assert_close(torch.compile(model, backend="se_fx")(x), model(x))
    assert len(rewritten) == 1
    assert not torch._inductor.config.freezing


@pytest.mark.integration
@torch.no_grad()
def test_weights_that_stay_inputs_may_change() -> None:
    model, x = net(), images()
    compiled = torch.compile(model, backend="se_fx")
    before = compiled(x)
    model.load_state_dict(net(1).state_dict())
    assert_close(compiled(x), model(x))
    assert not torch.allclose(before, model(x), 0.1)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was warned of, without what to do about it."""
    ours = [record for record in caplog.records if record.name == "se_fx" and record.levelno >= logging.WARNING]
    return [record.message.partition(":")[0] for record in ours]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("way", ["options", "config"])
@torch.no_grad()
def test_frozen_weights_that_change_are_seen(way: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x = net(), images()
    with torch._inductor.config.patch(freezing=way == "config", freezing_discard_parameters=False):
        compiled = torch.compile(model, backend="se_fx", options=FROZEN if way == "options" else None)
        before = compiled(x)
        assert_close(before, model(x))
        model.load_state_dict(net(1).state_dict())
        for _ in range(2):
            assert_close(compiled(x), model(x))
        assert not torch.allclose(before, model(x), 0.1)
        assert warnings(caplog) == ["weights were changed after they were frozen"]
        if way == "options":
            model.unit.se.fc2.weight = nn.Parameter(torch.randn_like(model.unit.se.fc2.weight))
            assert_close(compiled(x), model(x))
        torch._dynamo.reset()
        assert_close(compiled(x), model(x))
    assert len(warnings(caplog)) == 1


@pytest.mark.usefixtures("quick")
@torch.no_grad()
def test_two_models_in_one_process(rewritten: list[int]) -> None:
    models, x = [net(0), net(1)], images()
    compiled = [torch.compile(model, backend="se_fx", options=FROZEN) for model in models]
    for _ in range(2):
        for model, fast in zip(models, compiled, strict=True):
            assert_close(fast(x), model(x))
    assert len(rewritten) == 2


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("skip", ["skip_guard_on_all_nn_modules_unsafe", "skip_all_guards_unsafe"])
@torch.no_grad()
def test_weights_are_looked_at_where_guards_are_skipped(skip: str, rewritten: list[int]) -> None:
    """Code that was compiled for the first model is taken for the second, whose class is the same."""
    models, x = [net(0), net(1)], images()
    options = {**FROZEN, "guard_filter_fn": getattr(torch.compiler, skip)}
    compiled = [torch.compile(model, backend="se_fx", options=options.copy()) for model in models]
    for _ in range(2):
        for model, fast in zip(models, compiled, strict=True):
            assert_close(fast(x), model(x))
    models[0].load_state_dict(net(2).state_dict())
    assert_close(compiled[0](x), models[0](x))
    assert len(rewritten) == 1


@pytest.mark.usefixtures("quick")
@torch.no_grad()
def test_a_dynamic_batch_compiles_once(rewritten: list[int]) -> None:
    model = net()
    compiled = torch.compile(model, backend="se_fx", options=FROZEN, dynamic=True)
    graphs = set()
    for batch in (2, 3, 7):
        assert_close(compiled(images(batch)), model(images(batch)))
        graphs.add(len(rewritten))
    assert len(graphs) == 1
    assert rewritten[-1] >= 4


CACHED = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_backend import net, images, FROZEN
model = net(int(sys.argv[1]))
with torch.no_grad():
    compiled = torch.compile(model, backend="se_fx", options=FROZEN if sys.argv[2] == "frozen" else None)
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-3, atol=1e-5)
"""


@pytest.mark.integration
@pytest.mark.parametrize("frozen", ["frozen", "not"])
def test_caches_on_disk_hold_no_weights(frozen: str, tmp_path: Path) -> None:
    """Cold, warm, and warm with other weights, each in a process of its own."""
    code = CACHED.format(tests=str(Path(__file__).parent))
    for seed in "001":
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code, seed, frozen], check=True, env=environment)


@pytest.mark.integration
def test_training_is_inductors(rewritten: list[int]) -> None:
    found = []
    for backend in ("inductor", "se_fx"):
        torch.compiler.reset()
        model = net().train()
        loss = torch.compile(model, backend=backend, options=FROZEN)(images()).square().sum()
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters()), *model.buffers()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert rewritten == []


class Switching(nn.Module):
    """Runs a part under autocast, which Dynamo's graphs have as two statements."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.unit(x)
        return self.unit(y.float())


@pytest.mark.usefixtures("quick")
@torch.no_grad()
def test_graphs_that_switch_modes_are_left_alone(rewritten: list[int]) -> None:
    model, x = settled(Switching(Unit())), torch.randn(2, 8, 16, 12)
    compiled = torch.compile(model, backend="se_fx", options=FROZEN, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=0.05, atol=0.05)  # bfloat16, fused otherwise
    assert rewritten == []
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.usefixtures("quick")
@torch.no_grad()
def test_under_autocast(rewritten: list[int]) -> None:
    model, x = net(), images()
    compiled = torch.compile(model, backend="se_fx", options=FROZEN)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x), rtol=0.05, atol=0.05)  # bfloat16, fused otherwise
    assert len(rewritten) == 1


class Broken(nn.Module):
    """A graph break between a convolution and its block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unit = nn.Conv2d(3, 8, 1), Unit()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.unit(x) * len(self.unit.se.fc1.bias)


@pytest.mark.integration
@torch.no_grad()
def test_parts_of_a_program_and_no_more_breaks_than_inductors(rewritten: list[int]) -> None:
    model, x = settled(Broken()), images()
    breaks = {}
    for backend in ("inductor", "se_fx"):
        torch.compiler.reset()
        counters.clear()
        assert_close(torch.compile(model, backend=backend, options=FROZEN)(x), model(x))
        breaks[backend] = sum(counters["graph_break"].values())
    assert breaks["se_fx"] == breaks["inductor"] == 1
    assert sorted(rewritten)[-1] >= 4


def of_transformers(kind: str, **sizes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind.partition('For')[0]}Config")
    return getattr(transformers, kind)(config(**sizes))


def detector() -> nn.Module:
    return pytest.importorskip("ultralytics.nn.tasks").DetectionModel("yolov8n.yaml", verbose=False)


ELSEWHERE = {
    "mobilenet_v2": lambda: of_transformers(
        "MobileNetV2ForImageClassification", depth_multiplier=0.35, finegrained_output=False
    ),
    "segformer": lambda: of_transformers("SegformerForSemanticSegmentation", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    "yolov8n": detector,
}


@pytest.mark.integration
@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.usefixtures("quick")
@torch.no_grad()
def test_with_blocks_in_networks_that_fx_cannot_trace(name: str, rewritten: list[int]) -> None:
    """As close as the compiler alone, and in as many graphs."""
    torch.manual_seed(0)
    model = ELSEWHERE[name]()
    se_fx.apply_squeeze_excite(model, 1 / 4, 8, placement="activation" if name == "yolov8n" else "conv")
    model, x = settled(model), torch.rand(2, 3, 64, 64)
    expected, graphs = leaves(model(x)), {}
    for backend in ("aot_eager", "se_fx"):
        torch.compiler.reset()
        counters.clear()
        options = {"options": FROZEN} if backend == "se_fx" else {}
        for ours, theirs in zip(leaves(torch.compile(model, backend=backend, **options)(x)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        graphs[backend] = (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
    assert graphs["se_fx"] == graphs["aot_eager"]
    assert sum(rewritten) > len(se_fx.blocks_of(model))


def leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(dict(output) if isinstance(output, dict) else output) if isinstance(leaf, Tensor)]


class Counting(nn.Module):
    """Writes to a buffer at each call, which must stay one."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = Unit()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.unit(x) * self.calls


@pytest.mark.usefixtures("quick")
@torch.no_grad()
def test_a_state_that_is_written_stays_one(rewritten: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model, x = settled(Counting()), torch.randn(2, 8, 16, 12)
    compiled, expected = torch.compile(model, backend="se_fx", options=FROZEN), model.unit(x)
    for calls in (1, 2, 3):
        assert_close(compiled(x), calls * expected)
    assert model.calls == 3
    assert rewritten[0] >= 4
    assert warnings(caplog) == []


@pytest.mark.integration
def test_options_are_inductors() -> None:
    with torch.no_grad(), pytest.raises(Exception, match="no_such_option"):
        torch.compile(net(), backend="se_fx", options={"no_such_option": 1})(images())
    with torch.no_grad(), pytest.raises(Exception, match="Unrecognized mode"):
        torch.compile(net(), backend="se_fx", mode="fastest")(images())
