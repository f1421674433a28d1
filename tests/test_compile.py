"""`torch.compile` in training: one graph, compiled once for a mode, with eager mode's losses and gradients.

The backend is mostly aot_eager: it runs ATen's kernels, as eager mode does, some of them decomposed, so that fp32's default
tolerances hold. Dynamo, which decides on graphs and recompilations, and AOTAutograd are the same for all backends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from test_copies import KINDS, WAYS, X, hybrid
from torch import Tensor, nn
from torch._dynamo.utils import counters

import se_fx

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_compiler")]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[("whole graph", "residual, identity"), ("two modes", "conv, default"), ("split", "in place")])
def model(request: pytest.FixtureRequest) -> nn.Module:
    kind, way = request.param
    return WAYS[way](KINDS[kind]())


@pytest.fixture
def of_each_kind(kind: str) -> nn.Module:
    return WAYS["conv, default"](KINDS[kind]())


def compiled(model: nn.Module, dynamic: bool | None = None) -> Callable[..., Tensor]:
    """The model as one graph; raises where it would be several."""
    return torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)


def compilations() -> int:
    """How many graphs were compiled since the test began."""
    return int(counters["stats"]["unique_graphs"])


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_trains_alike(model: nn.Module, twin: nn.Module, run: Callable[..., Tensor], x: Tensor, **tolerances: float) -> None:
    """One step of `model` as `run` runs it, and of its `twin` in eager mode: outputs, gradients, and buffers agree."""
    results = []
    for each, forward in ((model, run), (twin, twin)):
        each.zero_grad()
        torch.manual_seed(1)
        output = forward(x)
        output.square().mean().backward()
        results.append((output, gradients(each), dict(each.named_buffers())))
    torch.testing.assert_close(*results, **tolerances)


# ------------------------------------------------------------------------------------------------------------- training
def test_mixed_precision_with_a_gradient_scaler(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    run = compiled(model)
    losses: dict[str, list[float]] = {"compiled": [], "eager": []}
    for name, each, forward in (("compiled", model, run), ("eager", twin, twin)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        for step in range(5):
            torch.manual_seed(step)
            stance = "fail_on_recompile" if step and name == "compiled" else "default"
            with torch.compiler.set_stance(stance), torch.autocast("cpu", dtype=torch.bfloat16):
                loss = (forward(X) - 1).float().square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[name].append(loss.item())
        assert scaler.get_scale() == 1024  # it grew twice: no gradient overflowed
    assert (compilations(), not counters["graph_break"]) == (1, True)
    assert losses["compiled"][-1] < losses["compiled"][0]
    # bfloat16 has 8 bits; compiled code rounds to it at other places.
    torch.testing.assert_close(losses["compiled"], losses["eager"], rtol=2**-6, atol=0)


def test_gradients_are_those_of_eager_mode(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    run = compiled(model)
    for _ in range(3):
        assert_trains_alike(model, twin, run, X)
    assert compilations() == 1
    changed = [name for name, gradient in gradients(model).items() if "squeeze_excite" in name and gradient.abs().sum() > 0]
    assert changed


def test_channels_last(of_each_kind: nn.Module) -> None:
    model = of_each_kind
    model.to(memory_format=torch.channels_last)
    twin, x = copy.deepcopy(model), X.contiguous(memory_format=torch.channels_last)
    run = compiled(model)
    for _ in range(2):
        assert_trains_alike(model, twin, run, x)
    assert run(x).is_contiguous(memory_format=torch.channels_last)
    assert compilations() == 1


def test_inductor() -> None:
    model = WAYS["conv, default"](KINDS["two modes"]())
    twin = copy.deepcopy(model)
    with torch._inductor.config.patch(fallback_random=True):  # eager mode's random numbers, for dropout
        run = torch.compile(model, fullgraph=True)
        for _ in range(2):
            assert_trains_alike(model, twin, run, X, rtol=1e-4, atol=1e-6)  # sums in another order
    assert compilations() == 1


# ------------------------------------------------------------------------------------------------------------- batches
BATCHES = (6, 3, 13)  # below 16: PyTorch's convolutions on a CPU choose kernels by whether the batch is smaller than that


@pytest.mark.parametrize(("dynamic", "expected"), [(None, 2), (True, 1)])
def test_other_batches_make_it_dynamic_once(kind: str, dynamic: bool | None, expected: int) -> None:
    model = WAYS["conv, default"](KINDS[kind]())
    twin = copy.deepcopy(model)
    run = compiled(model, dynamic)
    for batch in (4, *BATCHES):
        assert_trains_alike(model, twin, run, torch.randn(batch, *X.shape[1:]))
    assert compilations() == expected


def test_a_batch_marked_as_dynamic_is_never_compiled_again(kind: str) -> None:
    model = WAYS["in place"](KINDS[kind]())
    twin = copy.deepcopy(model)
    run = compiled(model)
    x = X.clone()
    torch._dynamo.mark_dynamic(x, 0)
    assert_trains_alike(model, twin, run, x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in BATCHES:
            assert_trains_alike(model, twin, run, torch.randn(batch, *X.shape[1:]))
    assert compilations() == 1


# --------------------------------------------------------------------------------------------------------------- modes
def test_each_mode_is_compiled_once(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    run = compiled(model)
    outputs = []
    for epoch in range(3):
        for training in (True, False):
            model.train(training), twin.train(training)
            with torch.compiler.set_stance("fail_on_recompile" if epoch else "default"):
                torch.manual_seed(epoch)
                outputs.append(run(X))
                torch.manual_seed(epoch)
                torch.testing.assert_close(outputs[-1], twin(X))
    assert compilations() == 2
    assert not torch.equal(outputs[0], outputs[1])


def test_freezing_and_unfreezing_compiles_once_more(kind: str) -> None:
    model = WAYS["conv, default"](KINDS[kind]())
    old = [p for name, p in model.named_parameters() if "squeeze_excite" not in name]
    run = compiled(model)
    for frozen in (True, False, True, False):
        for parameter in old:
            parameter.requires_grad_(not frozen)
            parameter.grad = None
        run(X).square().mean().backward()
        assert all((parameter.grad is None) == frozen for parameter in old)
    assert compilations() == 2


# ------------------------------------------------------------------------------------------------- ways to be compiled
def test_compiled_in_place_keeps_keys_and_class(of_each_kind: nn.Module) -> None:
    model = of_each_kind
    keys, kind, twin = list(model.state_dict()), type(model), copy.deepcopy(model)
    model.compile(backend="aot_eager", fullgraph=True)
    assert_trains_alike(model, twin, model, X)
    assert (list(model.state_dict()), type(model)) == (keys, kind)
    assert compilations() == 1


def test_a_functional_step_is_one_graph(of_each_kind: nn.Module) -> None:
    model = of_each_kind
    twin = copy.deepcopy(model)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, (parameters, buffers), (x,)).square().mean()

        return torch.func.grad(loss)(parameters)

    model.eval(), twin.eval()
    found = step(dict(model.named_parameters()), dict(model.named_buffers()), X)
    twin(X).square().mean().backward()
    torch.testing.assert_close(found, gradients(twin))
    assert compilations() == 1


def test_a_whole_step_breaks_no_more_than_the_originals(kind: str) -> None:
    breaks, losses = [], []
    original = KINDS[kind]()
    for model in (original, WAYS["conv, default"](copy.deepcopy(original))):
        torch.compiler.reset()
        counters.clear()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        @torch.compile(backend="aot_eager")
        def step(x: Tensor, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        losses.append([step(X).item() for _ in range(3)])
        breaks.append(sum(counters["graph_break"].values()))
    assert breaks[1] == breaks[0]
    assert all(each[-1] < each[0] for each in losses)


# ------------------------------------------------------------------------------------------------ networks of others
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet10": lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10),
    "timm's test_resnet": lambda: timm.create_model("test_resnet", num_classes=10),
    "timm's hybrid, split": hybrid,
}


@pytest.mark.parametrize(("name", "way"), [*((name, "transform") for name in NETWORKS), ("timm's test_resnet", "in place")])
def test_networks_of_others_train(name: str, way: str) -> None:
    model = NETWORKS[name]()
    if way == "in place":
        se_fx.apply_squeeze_excite(model, latent_channels=4, min_channels=64)
    else:
        model = se_fx.transform(model, latent_channels=4, min_channels=64)
    twin = copy.deepcopy(model)
    run = compiled(model)
    for _ in range(2):
        assert_trains_alike(model, twin, run, torch.randn(4, 3, 32, 32), rtol=1e-3, atol=1e-4)  # through many layers
    assert compilations() == 1


def test_googlenet_flips_its_modes() -> None:
    model = se_fx.transform(
        torchvision.models.googlenet(init_weights=False, num_classes=10), min_channels=192, latent_channels=4
    )
    run, x = torch.compile(model, backend="eager", fullgraph=True), torch.randn(2, 3, 32, 32)
    for training in (True, False, True, False):
        assert isinstance(run.train(training)(x), Tensor) != training  # heads are auxiliary to training
    assert compilations() == 2
