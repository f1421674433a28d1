"""Blocks travel alone: what `save_blocks` writes, `load_blocks` puts into the same network, bit for bit, or refuses."""

from __future__ import annotations

import copy
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_faults import Calls, difference, watched, world
from torch import Tensor, nn

import se_fx
from se_fx import sharing
from se_fx.blocks import BLOCKS, GATES

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"placement": "norm", "min_channels": 1, "latent_channels": 2}
OTHERS: dict[str, Any] = {"latent_channels": 64}  # the default, since blocks of others have no such option
KEY = "se_fx.blocks"


class Unit(nn.Module):
    """Its own code scales a value: the block stands in a graph of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)).relu())


def network(channels: int = 8) -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(channels, 8, 1), Unit(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def transformed(**options: Any) -> nn.Module:
    return se_fx.transform(network(), **{**OPTIONS, **options})


def applied(**options: Any) -> nn.Module:
    model = network()
    se_fx.apply_squeeze_excite(model, **{**OPTIONS, **options})
    return model


KINDS: dict[str, Callable[..., nn.Module]] = {"transformed": transformed, "in place": applied}


def trained(model: nn.Module, seed: int) -> nn.Module:
    """Other values in all blocks."""
    generator = torch.Generator().manual_seed(seed)
    for block in se_fx.blocks_of(model).values():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator).abs() * 0.3)  # gates are not saturated
    return model


def states(model: nn.Module) -> dict[str, Tensor]:
    return {f"{site} {key}": value for site, b in se_fx.blocks_of(model).items() for key, value in b.state_dict().items()}


def check_alike(a: nn.Module, b: nn.Module) -> None:
    mine, theirs = states(a), states(b)
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    assert se_fx.Plan.of(a).to_dict() == se_fx.Plan.of(b).to_dict()
    assert torch.equal(a(X), b(X))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gates.safetensors"


# ------------------------------------------------------------------------------------------------------------ there and back
@pytest.mark.parametrize("loaded", [network, *KINDS.values()], ids=["without", *KINDS])
@pytest.mark.parametrize("saved", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("init", ["default", "identity"])
def test_there_and_back(init: str, saved: Callable[..., nn.Module], loaded: Callable[..., nn.Module], file: Path) -> None:
    options = {"init": init, "bias": init == "default", "gate": "hardsigmoid", "activation": "silu"}
    source = trained(saved(**options), 1)
    se_fx.save_blocks(source, file)
    target = loaded() if loaded is network else loaded(**options)
    with torch.no_grad():
        assert not torch.equal(target(X), source(X))
    random = torch.get_rng_state()
    se_fx.load_blocks(target, str(file))
    assert torch.equal(torch.get_rng_state(), random)
    check_alike(source, target)
    assert se_fx.blocks_of(target)["0"].gate_scale == (2.0 if init == "identity" else 1.0)


def test_the_file_has_the_blocks_keys_alone_and_is_the_same_each_time(file: Path, tmp_path: Path) -> None:
    model = trained(transformed(), 1)
    se_fx.save_blocks(model, file)
    tensors = load_file(file)
    blocks = {key for key in model.state_dict() if "squeeze_excite" in key}
    assert tensors.keys() == blocks
    assert not transformed().load_state_dict(tensors, strict=False).unexpected_keys
    first = file.read_bytes()
    se_fx.save_blocks(model, file)
    assert file.read_bytes() == first
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_another_process(file: Path) -> None:
    model = trained(transformed(), 1)
    se_fx.save_blocks(model, file)
    torch.save((network(), X), file.with_suffix(".pt"))
    code = f"""
import sys, torch, se_fx
sys.path.insert(0, {str(Path(__file__).parent)!r})
model, x = torch.load({str(file.with_suffix(".pt"))!r}, weights_only=False)
se_fx.load_blocks(model, {str(file)!r})
torch.save(model(x), {str(file.with_suffix(".out"))!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    # Another process may have another number of threads, which rounds otherwise.
    torch.testing.assert_close(torch.load(file.with_suffix(".out")), model(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_one_backbone_and_two_tasks(make: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    outputs = {}
    for task, seed in {"a": 1, "b": 2}.items():
        outputs[task] = trained(model, seed)(X)
        se_fx.save_blocks(model, tmp_path / task)
    assert not torch.equal(outputs["a"], outputs["b"])
    before = dict(model.named_parameters())
    compilations = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: compilations.append(graph) or graph.forward)
    monkeypatch.setattr(sharing, "apply_squeeze_excite", None)  # nothing is traced
    for task in "abbaab":
        se_fx.load_blocks(model, tmp_path / task)
        assert torch.equal(model(X), outputs[task])
        assert torch.equal(compiled(X), outputs[task])
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert len(compilations) == 1


class Attention(nn.Module):
    """It has parameters, buffers of numbers and counts, and something else to say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.power = nn.BatchNorm2d(channels), 1

    def forward(self, x: Tensor) -> Tensor:
        return x * self.norm(x).sigmoid() ** self.power

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.power])

    def set_extra_state(self, state: Tensor) -> None:
        if int(state) > 9:
            raise ValueError("too high")
        self.power = int(state)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("target", [network, lambda: transformed(block="attention", **OTHERS)], ids=["without", "with"])
def test_blocks_of_others(target: Callable[[], nn.Module], file: Path) -> None:
    BLOCKS["attention"] = Attention
    model = trained(applied(block="attention", **OTHERS), 1)
    se_fx.blocks_of(model)["0"].power = 3
    se_fx.save_blocks(model, file)
    other = target()
    se_fx.load_blocks(other, file)
    check_alike(model, other)
    assert se_fx.blocks_of(other)["0"].power == 3


@pytest.mark.usefixtures("tables")
def test_a_block_that_serves_several_sites(file: Path) -> None:
    one = nn.Conv2d(8, 8, 1)
    BLOCKS["one"] = lambda channels: one
    model = transformed(block="one", **OTHERS)
    se_fx.save_blocks(model, file)
    expected = model(X)
    one.requires_grad_(False).weight.zero_()
    se_fx.load_blocks(model, file)
    assert torch.equal(model(X), expected)


def test_a_conv_by_itself_and_no_block_at_all(file: Path) -> None:
    model, twin = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
    se_fx.apply_squeeze_excite(model, 2, 1)
    twin.load_state_dict(model.state_dict(), strict=False)
    se_fx.save_blocks(model, file)
    se_fx.load_blocks(twin, file)
    check_alike(model, twin)
    se_fx.save_blocks(transformed(min_channels=10**6), file)
    plain = network()
    se_fx.load_blocks(plain, file)
    assert len(se_fx.Plan.of(plain)) == 0
    se_fx.save_blocks(twin, file)


@pytest.mark.parametrize("before", [network, applied, transformed])
@pytest.mark.parametrize(("mine", "theirs"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_dtypes_are_the_models(before: Callable[[], nn.Module], mine: str, theirs: str, file: Path) -> None:
    source, target = trained(transformed(), 1).to(getattr(torch, theirs)), before().to(getattr(torch, mine))
    se_fx.save_blocks(source, file)
    with torch.device("meta"):  # the default device is no matter
        se_fx.load_blocks(target, file)
    weights = {site: block.fc2.weight for site, block in se_fx.blocks_of(target).items()}
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, mine)}
    for site, block in se_fx.blocks_of(source).items():
        assert torch.equal(weights[site], block.fc2.weight.to(weights[site].dtype))


def test_a_model_optimised_for_training_takes_values_too(file: Path) -> None:
    source = trained(transformed(), 1)
    se_fx.save_blocks(source, file)
    lean = se_fx.optimize_for_training(transformed())
    se_fx.load_blocks(lean, file)
    assert torch.equal(lean.eval()(X), source(X))


# ------------------------------------------------------------------------------------------------------- refused: models
def one_site() -> nn.Module:
    return se_fx.transform(network(), se_fx.plan(network(), **OPTIONS).only("0"))


def replaced() -> nn.Module:
    model = transformed()
    model[4] = Unit()
    return model


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no such conv": (lambda: network()[:3], r"site '4.conv' does not fit: Sequential has no such Conv2d"),
    "no convs": (lambda: nn.Linear(2, 2), r"site '0' does not fit: Linear has no such Conv2d"),
    "no norm": (lambda: nn.Conv2d(3, 8, 1), r"site '0' does not fit: Conv2d has no such Conv2d"),
    "other channels": (lambda: network(16), r"site '0' does not fit: the plan has 8 channels there, the model 16"),
    "meta": (lambda: network().to("meta"), r"site '0' does not fit: fc1.weight is on the meta device"),
    "meta, with blocks": (lambda: transformed().to("meta"), r"site '0' does not fit: fc1.weight is on the meta device"),
    "other width": (lambda: transformed(latent_channels=4), r"at site '0' the file has latent_channels=2, the model 4; call"),
    "other gate": (lambda: applied(gate="hardsigmoid"), r"has gate='sigmoid', the model 'hardsigmoid'; call se_fx.remove"),
    "fewer": (one_site, r"the file alone has a block at site '4.conv'"),
    "more": (lambda: transformed(placement="activation"), r"has placement='norm', the model 'activation'"),
    "compiled": (lambda: torch.compile(network()), r"model is compiled already"),
    "compiled, with blocks": (lambda: torch.compile(transformed()), r"pass its \._orig_mod"),
    "wrapped": (lambda: nn.DataParallel(network()), r"wrapped for distribution already"),
    "wrapped, with blocks": (lambda: nn.DataParallel(transformed()), r"pass its \.module"),
    "a part with blocks": (lambda: Around(transformed()), r"got Around; pass its \.inner"),
    "a part replaced": (replaced, r"model: its plan and its blocks differ at site '4.conv'"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blocks") / "gates.safetensors"
    se_fx.save_blocks(trained(transformed(), 1), path)
    return path


def refused(model: nn.Module, path: Path, match: str) -> None:
    """It is refused, and nothing has changed."""
    before = world(model, [])
    with pytest.raises(se_fx.SqueezeExciteError, match=match) as caught:
        se_fx.load_blocks(model, path)
    assert difference(before, world(model, [])) == []
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("case", MODELS)
def test_models_that_do_not_fit(case: str, saved: Path) -> None:
    make, match = MODELS[case]
    if case.startswith("meta"):
        model = make()
        keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
        with pytest.raises(se_fx.SqueezeExciteError, match=match):
            se_fx.load_blocks(model, saved)
        assert (list(model.state_dict()), [type(module) for module in model.modules()]) == (keys, kinds)
        return
    refused(make(), saved, match)


def test_the_way_out_of_other_blocks(saved: Path) -> None:
    model = se_fx.remove(transformed(latent_channels=4))
    se_fx.load_blocks(model, saved)
    check_alike(trained(transformed(), 1), model)


# -------------------------------------------------------------------------------------------------------- refused: files
Tensors, Described = dict[str, Tensor], dict[str, Any]
FC1 = "squeeze_excite.of_0.fc1.weight"


def put(key: str, value: Any) -> Callable[[Tensors, Described], None]:
    return lambda tensors, data: tensors.update({key: value})


def say(**changes: Any) -> Callable[[Tensors, Described], None]:
    return lambda tensors, data: data.update(changes)


def site(**changes: Any) -> Callable[[Tensors, Described], None]:
    return lambda tensors, data: data["plan"]["sites"][0].update(changes)


EXTRA = "squeeze_excite.of_0._extra_state"
FILES: dict[str, tuple[Callable[[Tensors, Described], Any], str]] = {
    "missing": (lambda tensors, data: tensors.pop(FC1), r"site '0' does not fit: fc1.weight isn't in the file"),
    "no extra state": (lambda tensors, data: tensors.pop(EXTRA), r"site '0' does not fit: _extra_state isn't in the file"),
    "unknown": (put("0.weight", torch.zeros(8, 3, 3, 3)), r"the tensor '0.weight' is of no block of the model"),
    "shape": (put(FC1, torch.zeros(4, 8)), r"'0' does not fit: fc1.weight is of shape \(4, 8\) in the file and \(2, 8\)"),
    "transposed": (put(FC1, torch.zeros(8, 2)), r"of shape \(8, 2\) in the file and \(2, 8\) in the model"),
    "whole numbers": (put(FC1, torch.zeros(2, 8, dtype=torch.int64)), r"is of torch.int64 in the file and of torch.float32"),
    "truth values": (put(FC1, torch.zeros(2, 8, dtype=torch.bool)), r"is of torch.bool in the file"),
    "too large": (put(FC1, torch.full((2, 8), 1e300, dtype=torch.float64)), r"which has not the range for its values"),
    "other gate": (
        put(EXTRA, torch.tensor(list(b'{"gate_scale": 1.0, "gate": "hardsigmoid", "activation": "relu"}'), dtype=torch.uint8)),
        r"site '0' does not fit: gate: the checkpoint is of a block with gate='hardsigmoid'",
    ),
    "last site's": (put("4.squeeze_excite.of_conv._extra_state", torch.zeros(3)), r"site '4.conv' does not fit: _extra_state="),
    "extra state": (put(EXTRA, torch.zeros(2**17)), r"_extra_state has 131,072 numbers in the file"),
    "later version": (say(version=2), r"of version 1, and got version 2; upgrade se_fx"),
    "no version": (lambda tensors, data: data.pop("version"), r"of version 1, and got version None"),
    "version of another type": (say(version=True), r"got version True"),
    "more keys": (say(run="reboot"), r"expected the keys version, plan and blocks alone"),
    "no blocks": (say(blocks={}), r"blocks={}: expected a name for each site of the plan"),
    "blocks of no names": (say(blocks={"0": 1, "4.conv": 3}), r"expected a name for each site"),
    "names of other blocks": (say(blocks={"0": "a", "4.conv": "c"}), r"site '0' does not fit: _extra_state isn't in"),
    "no plan": (say(plan=None), r"plan: expected what Plan.to_dict\(\) returns"),
    "later plan": (say(plan={"version": 2, "sites": []}), r"upgrade se_fx"),
    "unknown gate": (site(gate="__import__('os').abort()"), r"gate=.*own ones must be added to se_fx.blocks.GATES"),
    "unknown block": (site(block="os.abort", latent_channels=None), r"must be added to se_fx.blocks.BLOCKS"),
    "very wide": (site(latent_channels=2**20), r"expected a hidden width of at most 1024"),
    "another conv": (site(name="weight"), r"expected a name for each site"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("make", [network, transformed])
def test_files_that_are_wrong_within(make: Callable[[], nn.Module], case: str, saved: Path, file: Path) -> None:
    change, match = FILES[case]
    tensors, data = load_file(saved), described(saved)
    change(tensors, data)
    save_file(tensors, file, {KEY: json.dumps(data)})
    if case in ("other gate", "last site's") and make is transformed:  # blocks before it have been given values, and back
        model = trained(make(), 2)
        before = copy.deepcopy(model)
        with pytest.raises(se_fx.SqueezeExciteError, match=match):
            se_fx.load_blocks(model, file)
        check_alike(before, model)
        return
    refused(make(), file, match)


def described(path: Path) -> Described:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"][KEY])  # type: ignore[no-any-return]


def headed(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header


def other_files(whole: bytes) -> Iterator[tuple[bytes, str]]:
    yield b"", "expected a whole file"
    yield b"PK", "expected a whole file"
    for cut in (8, 100, len(whole) // 2, len(whole) - 1):
        yield whole[:cut], "expected a whole file"
    yield whole + b"x", "expected a whole file"
    yield headed(b"{}", 2**63), r"with a header of at most 16,777,216 bytes, and got 9,223,372,036,854,775,808"
    yield headed(b"{}", 2**24 + 1), r"at most 16,777,216 bytes, and got 16,777,217"
    yield headed(b"[" * 10**5), "expected a whole file"
    yield headed(b"{}"), "got version None"
    for text in ("", "{", "[]", "3", "[" * 10**5, '"x"', '{"version": NaN}', "9" * 10**4):
        yield headed(json.dumps({"__metadata__": {KEY: text}}).encode()), "got version"
    huge = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    yield headed(json.dumps(huge).encode()), "expected a whole file"


def test_other_files(saved: Path, file: Path) -> None:
    models = [network(), transformed()]
    for content, match in other_files(saved.read_bytes()):
        file.write_bytes(content)
        for model in models:
            refused(model, file, match)
    for model in models:
        refused(model, file.parent, "can't be read: IsADirectoryError")
        refused(model, file / "none", "can't be read: NotADirectoryError")


def test_an_interrupt_anywhere_leaves_all_blocks_as_they_were(saved: Path) -> None:
    for make in (network, transformed):
        calls = Calls()
        with watched(calls):
            se_fx.load_blocks(make(), saved)
        functions = [name for name in calls if name.startswith(("sharing.", "blocks."))]
        assert len(functions) > 10
        for function in functions:
            model = make()
            values, plan = copy.deepcopy(model.state_dict()), model.__dict__.get("_squeeze_excite_plan")
            with pytest.raises(KeyboardInterrupt), watched(Calls(), KeyboardInterrupt(), function, calls[function]):
                se_fx.load_blocks(model, saved)
            now = model.state_dict()
            assert now.keys() == values.keys(), function
            assert all(torch.equal(now[key], value) for key, value in values.items()), function
            assert model.__dict__.get("_squeeze_excite_plan") is plan


# ------------------------------------------------------------------------------------------------------- refused: saving
@pytest.mark.usefixtures("tables")
def test_functions_without_a_name_in_the_tables_are_not_saved(file: Path) -> None:
    def squared(x: Tensor) -> Tensor:
        return x.sigmoid() ** 2

    model = transformed(gate=squared)
    with pytest.raises(
        se_fx.SqueezeExciteError, match=r"model: its blocks could not be loaded again: .*squared.*se_fx.blocks.G"
    ):
        se_fx.save_blocks(model, file)
    with pytest.raises(se_fx.SqueezeExciteError, match=r"<lambda>.*must be added to se_fx.blocks.BLOCKS"):
        se_fx.save_blocks(transformed(block=lambda channels: nn.Identity(), **OTHERS), file)
    assert not file.exists()
    GATES[se_fx.Plan.of(model).sites[0].gate] = lambda: squared  # type: ignore[assignment, return-value]
    se_fx.save_blocks(model, file)
    other = network()
    se_fx.load_blocks(other, file)
    check_alike(model, other)


class Sparse(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.eye(channels).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return x


class Speaking(nn.Identity):
    def get_extra_state(self) -> dict[str, int]:
        return {"power": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda channels: Speaking(), "_extra_state at site '0' is a dict"),
        (Sparse, "model: its blocks can't be saved"),
    ],
)
def test_what_is_no_plain_tensor_is_not_saved(make: Callable[[int], nn.Module], match: str, file: Path) -> None:
    BLOCKS["other"] = make
    model = transformed(block="other", **OTHERS)
    with pytest.raises(se_fx.SqueezeExciteError, match=match):
        se_fx.save_blocks(model, file)
    assert not file.exists()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (network, "call se_fx.transform first"),
        (lambda: transformed().to("meta"), "fc1.weight at site '0' is a tensor on the meta device"),
        (lambda: torch.compile(transformed()), r"pass its \._orig_mod"),
        (replaced, "its plan and its blocks differ at site '4.conv'"),
        (lambda: se_fx.optimize_for_inference(transformed()), "call se_fx.transform first"),
    ],
)
def test_models_whose_blocks_are_not_saved(make: Callable[[], nn.Module], match: str, file: Path) -> None:
    file.write_text("before")
    with pytest.raises(se_fx.SqueezeExciteError, match=match):
        se_fx.save_blocks(make(), file)
    assert file.read_text() == "before"


def test_a_failure_to_write_leaves_the_file_before(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformed()
    file.write_text("before")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            se_fx.save_blocks(model, file)
    with pytest.raises(se_fx.SqueezeExciteError, match="can't be written: FileNotFoundError"):
        se_fx.save_blocks(model, file.parent / "none" / "gates")
    monkeypatch.setattr(sharing, "MOST_HEADER_BYTES", 100)
    with pytest.raises(se_fx.SqueezeExciteError, match="with a header of at most 100 bytes"):
        se_fx.save_blocks(model, file)
    assert [(each.name, each.read_text()) for each in file.parent.iterdir()] == [(file.name, "before")]


def test_without_safetensors(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (se_fx.save_blocks, se_fx.load_blocks):
        with pytest.raises(se_fx.SqueezeExciteError, match=r"pip install 'se_fx\[safetensors\]'"):
            call(transformed(), saved)
