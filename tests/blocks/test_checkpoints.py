"""A checkpoint says all that decides what a block computes: loading it gives the same function, or an error."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import se_fx
from se_fx import SqueezeExcite2d, SqueezeExciteError

X = torch.randn(2, 3, 8, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))


def transformed(**options: Any) -> nn.Module:
    return se_fx.transform(net(), **{"min_channels": 1, "latent_channels": 2, **options})


def in_place(**options: Any) -> nn.Module:
    model = net()
    se_fx.apply_squeeze_excite(model, latent_channels=2, min_channels=1, **options)
    return model


def trained(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "squeeze_excite" in name:
            nn.init.normal_(parameter)
    return model


def by_torch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_safetensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save(dict(state)))


# ------------------------------------------------------------------------------------------------- the same function
@pytest.mark.parametrize("through", [dict, by_torch, by_safetensors, copy.deepcopy])
@pytest.mark.parametrize("options", [{"strict": True}, {"strict": False}, {"assign": True}])
@pytest.mark.parametrize(("saved", "own"), [("identity", "default"), ("default", "identity"), ("identity", "identity")])
def test_the_initialisation_goes_with_the_weights(
    through: Callable[..., Any], options: dict[str, bool], saved: str, own: str
) -> None:
    source, target = trained(transformed(init=saved)), transformed(init=own)
    target.load_state_dict(through(source.state_dict()), **options)
    assert torch.equal(target(X), source(X))


def test_one_written_out_by_hand() -> None:
    block = SqueezeExcite2d(2, latent_channels=1, init="identity")
    said = b'{"gate_scale": 2.0, "gate": "sigmoid", "activation": "relu"}'
    assert bytes(block.state_dict()["_extra_state"].tolist()) == said
    assert block.state_dict()["_extra_state"].dtype == torch.uint8
    other = SqueezeExcite2d(2, latent_channels=1)
    assert other.gate_scale == 1.0
    other.load_state_dict({**other.state_dict(), "_extra_state": torch.tensor(list(said), dtype=torch.uint8)})
    assert other.gate_scale == 2.0


def test_compiled_code_follows() -> None:
    source, target = trained(transformed(init="identity")), transformed()
    compiled = torch.compile(target, backend="eager")
    compiled(X)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(compiled(X), source(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_what_tools_do_to_all_tensors_does_no_harm(dtype: torch.dtype) -> None:
    source, target = trained(transformed(init="identity")), transformed()
    state = source.state_dict()
    told = {key: value.to(dtype) if key.endswith("_extra_state") else value for key, value in state.items()}
    target.load_state_dict(told)
    assert torch.equal(target(X), source(X))


def test_averaging_does_no_harm() -> None:
    a, b, target = trained(transformed(init="identity")), trained(transformed(init="identity")), transformed()
    b.load_state_dict({**b.state_dict(), "0.weight": a.state_dict()["0.weight"]})
    first, second = a.state_dict(), b.state_dict()
    target.load_state_dict({key: 0.7 * first[key] + 0.3 * second[key] for key in first})
    kept = target.get_submodule("squeeze_excite.of_0")
    assert kept.gate_scale == 2.0
    moving = transformed(init="identity")
    for mine, theirs in zip(moving.state_dict().values(), first.values(), strict=True):  # as timm's EMA does
        mine.copy_(0.9 * mine + 0.1 * theirs)
    assert moving.get_submodule("squeeze_excite.of_0").gate_scale == 2.0
    target.load_state_dict(moving.state_dict())


# ------------------------------------------------------------------------------------------------------ or a clear error
@pytest.mark.parametrize("through", [dict, by_torch, by_safetensors])
@pytest.mark.parametrize("options", [{"strict": True}, {"strict": False}, {"assign": True}])
@pytest.mark.parametrize(
    ("option", "saved", "own"),
    [("gate", "sigmoid", "hardsigmoid"), ("gate", "hardsigmoid", "sigmoid"), ("activation", "relu", "silu")],
)
@pytest.mark.parametrize("init", ["default", "identity"])
def test_another_gate_or_activation_is_refused(
    through: Callable[..., Any], options: dict[str, bool], option: str, saved: str, own: str, init: str
) -> None:
    source, target = trained(transformed(init=init, **{option: saved})), transformed(init=init, **{option: own})
    with pytest.raises(SqueezeExciteError, match=rf"^{option}: .*{option}='{saved}', and this one has {option}='{own}'"):
        target.load_state_dict(through(source.state_dict()), **options)


def scaled(x: Tensor) -> Tensor:
    return 2 * torch.sigmoid(x)


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x) ** 2


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1)


OWN = [scaled, sigmoid, Clipped(), torch.sigmoid, F.hardsigmoid, nn.Hardtanh(0, 1), nn.Hardtanh(0, 2)]
OWN += [functools.partial(F.hardtanh, min_val=0.0), functools.partial(F.hardtanh, min_val=0.1)]
OWN += [nn.Sequential(nn.Sigmoid(), nn.Hardtanh(0, 1)), nn.Sequential(nn.Sigmoid(), nn.Hardtanh(0, 2)), "sigmoid"]


@pytest.mark.parametrize("saved", range(len(OWN)))
def test_own_functions_go_by_their_names(saved: int) -> None:
    state = SqueezeExcite2d(8, gate=OWN[saved]).state_dict()
    for position, own in enumerate(OWN):
        block = SqueezeExcite2d(8, gate=copy.deepcopy(own))
        if position == saved:
            block.load_state_dict(state)
        else:
            with pytest.raises(SqueezeExciteError, match=r"^gate: "):
                block.load_state_dict(state)


def test_what_changes_nothing_is_not_asked_for() -> None:
    block = SqueezeExcite2d(8, activation=nn.ReLU(inplace=True), gate=nn.Sigmoid())
    block.load_state_dict(SqueezeExcite2d(8).state_dict())
    SqueezeExcite2d(8).load_state_dict(block.state_dict())


def test_a_script_s_own_function_is_that_which_others_import_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = SqueezeExcite2d(8, gate=scaled).state_dict()
    monkeypatch.setattr(scaled, "__module__", "__main__")
    SqueezeExcite2d(8, gate=scaled).load_state_dict(imported)
    with pytest.raises(SqueezeExciteError, match=r"^gate: "):
        SqueezeExcite2d(8, gate=sigmoid).load_state_dict(SqueezeExcite2d(8, gate=scaled).state_dict())
    monkeypatch.setattr(sigmoid, "__module__", "__main__")  # not the table's sigmoid
    with pytest.raises(SqueezeExciteError, match=r"^gate: "):
        SqueezeExcite2d(8).load_state_dict(SqueezeExcite2d(8, gate=sigmoid).state_dict())


@pytest.mark.parametrize(
    "state",
    [
        torch.zeros(3),
        torch.tensor(list(b"[1]"), dtype=torch.uint8),
        torch.tensor(list(b'{"gate": "sigmoid", "activation": "relu"}'), dtype=torch.uint8),
        torch.tensor(list(b'{"gate_scale": NaN, "gate": "sigmoid", "activation": "relu"}'), dtype=torch.uint8),
        torch.tensor(list(b'{"gate_scale": true, "gate": "sigmoid", "activation": "relu"}'), dtype=torch.uint8),
        torch.tensor(list(b'{"gate_scale": 1, "gate": ["sigmoid"], "activation": "relu"}'), dtype=torch.uint8),
        torch.tensor(list(b'{"gate_scale": 1, "gate": "sigmoid", "activation": "relu", "more": 1}'), dtype=torch.uint8),
        torch.full((4,), float("nan")),
        torch.tensor([500, 3]),
        "sigmoid",
        None,
    ],
)
def test_what_cannot_be_read_is_refused(state: Any) -> None:
    block = SqueezeExcite2d(8, init="identity")
    with pytest.raises(SqueezeExciteError, match=r"_extra_state|gate: the checkpoint"):
        block.load_state_dict({**block.state_dict(), "_extra_state": state})
    assert block.gate_scale == 2.0


# --------------------------------------------------------------------------------------------------- all else as it was
def test_a_checkpoint_of_the_original_loads_with_only_the_blocks_missing() -> None:
    for make in (transformed, in_place):
        rewritten = make()
        missing, unexpected = rewritten.load_state_dict(net().state_dict(), strict=False)
        assert not unexpected
        assert set(missing) == rewritten.state_dict().keys() - net().state_dict().keys()
        assert all("squeeze_excite" in key.split(".") for key in missing)
        assert len(missing) == 6


def test_weights_without_the_key_are_not_taken_for_whole() -> None:
    block = SqueezeExcite2d(8)
    state = {key: value for key, value in block.state_dict().items() if key != "_extra_state"}
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        block.load_state_dict(state)


def test_tensors_without_values_say_nothing() -> None:
    source = SqueezeExcite2d(8, init="identity")
    with torch.device("meta"):
        block = SqueezeExcite2d(8)
        assert block.state_dict()["_extra_state"].device.type == "cpu"
    block.load_state_dict({key: value.to("meta") for key, value in source.state_dict().items()})
    assert block.gate_scale == 1.0
    block.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x), x)
    with FakeTensorMode():
        block = SqueezeExcite2d(8)
        block.load_state_dict(block.state_dict())


def test_copies_keep_it() -> None:
    block = SqueezeExcite2d(8, init="identity")
    block.load_state_dict(SqueezeExcite2d(8).state_dict())
    for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert again.gate_scale == 1.0
        torch.testing.assert_close(again.state_dict(), block.state_dict(), rtol=0, atol=0)


def test_writing_into_a_state_dict_changes_no_block() -> None:
    block = SqueezeExcite2d(8)
    block.state_dict()["_extra_state"].zero_()
    assert bytes(block.state_dict()["_extra_state"].tolist()).startswith(b"{")
