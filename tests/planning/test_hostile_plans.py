"""Plans from elsewhere, broken or hostile: one clear error, no code run, no memory to speak of, no model changed."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import get_model

import se_fx
from se_fx import Plan, SqueezeExciteError
from se_fx.blocks import ACTIVATIONS, BLOCKS, GATES
from se_fx.capture import capture
from se_fx.measure.memory import peak_bytes
from se_fx.placement import PLACEMENTS
from se_fx.planning import fit

MODEL = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 1))
SAVED = se_fx.plan(MODEL, min_channels=1, latent_channels=4).to_dict()
#: Events of Python that reading a plan has no business to cause.
EVENTS = {
    "exec",
    "compile",
    "import",
    "open",
    "os.system",
    "subprocess.Popen",
    "pickle.find_class",
    "ctypes.dlopen",
    "code.__new__",
}
_seen: list[str] | None = None


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _seen is not None and event in EVENTS:
        _seen.append(f"{event} {args!r:.80}")


sys.addaudithook(_note)


def audited(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call returns, or the error that it raises, and the events it causes."""
    global _seen
    _seen = []
    try:
        return call(), _seen
    except Exception as error:
        return error, _seen
    finally:
        _seen = None


CAPTURED = capture(MODEL)


def refusal(data: Any) -> str:
    """The message that a plan is refused with; the text "accepted" where it isn't, and other errors as they are."""
    plan, events = audited(lambda: Plan.from_dict(data))
    if isinstance(plan, Plan):
        plan, events = audited(lambda read=plan: fit(CAPTURED, read).insertions())
    message = str(plan) if isinstance(plan, SqueezeExciteError) else f"accepted: {plan!r:.80}"
    return f"{message} with {events}" if events else message


def is_clear(message: str) -> bool:
    return message.startswith("plan") and "\n" not in message and len(message) < 600


def changed(site: int = 0, **changes: Any) -> dict[str, Any]:
    """A good plan with some values of a site changed."""
    data = copy.deepcopy(SAVED)
    data["sites"][site].update(changes)
    return data


def test_the_plan_itself_is_accepted() -> None:
    assert refusal(SAVED).startswith("accepted")
    assert refusal(json.loads(json.dumps(SAVED))).startswith("accepted")


# ---------------------------------------------------------------------------------------------------------------- broken
def test_every_beginning_of_a_plans_json() -> None:
    text = json.dumps(SAVED)
    whole = 0
    for length in range(len(text)):
        try:
            data = json.loads(text[:length])
        except json.JSONDecodeError:
            continue
        whole += 1
        assert is_clear(refusal(data)), text[:length]
    assert not whole  # JSON tells it already


WRONG = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1.0,
    math.nan,
    math.inf,
    10**12,
    2**63,
    10**5000,
    "",
    "x",
    b"x",
    [],
    {},
    [1],
    {"a": 1},
    nn,
]
NESTED: list[Any] = []
for _ in range(100_000):
    NESTED = [NESTED]


def mutations(value: Any) -> Iterator[tuple[str, Any]]:
    """All that one change at one place makes of a plan's data."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"without {key}", {other: kept for other, kept in value.items() if other != key}
            yield from ((f"{key}: {how}", {**value, key: other}) for how, other in mutations(inner))
        yield "with another key", {**value, "__class__": "x"}
        yield "with a key that is no string", {**value, 3: "x"}
        yield "with a long key", {**value, "a\n" * 10**6: "x"}
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield f"item {i} twice", [*value, inner]
            yield from ((f"item {i}: {how}", [*value[:i], other, *value[i + 1 :]]) for how, other in mutations(inner))
    if not (isinstance(value, dict) and "version" in value):
        for other in [*WRONG, NESTED]:
            if not (isinstance(value, bool) and isinstance(other, bool)) and not (value is None and other is None):
                yield f"{value!r:.30} is {str(type(other)) if other in (NESTED, 10**5000) else f'{other!r:.30}'}", other


def test_one_wrong_value_anywhere() -> None:
    count = 0
    for how, data in mutations(SAVED):
        if data.get("sites") == [] and data.get("version") == 1:
            continue  # a plan without sites is one
        message = refusal(data)
        assert is_clear(message), f"{how}: {message}"
        count += 1
    assert count > 400


@pytest.mark.parametrize("version", [2, 10**6, -1, "1", True, 1.0, [1]])
def test_plans_of_another_version(version: Any) -> None:
    message = refusal({**SAVED, "version": version, "new": [1, 2]})
    assert is_clear(message)
    assert "upgrade se_fx if a later one has saved it" in message


# --------------------------------------------------------------------------------------------------------------- hostile
NAMES = (
    *(
        "__class__",
        "forward.__globals__",
        "0.weight",
        "0.__init__",
        "training",
        "_modules",
        "T_destination",
        "0.forward",
        "squeeze_excite",
    ),
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        "C:\\",
        "file:///etc/passwd",
        "$(reboot)",
        "`reboot`",
        "; reboot",
        "%s%n",
        "{0.__class__}",
    ),
    *(
        "__import__('os').system('reboot')",
        "os.system",
        "torch.load",
        "builtins.eval",
        "lambda: 0",
        "torch.nn.ReLU",
        "nn.Identity()",
    ),
    *(
        "0\n",
        " 0",
        "0 ",
        "0.",
        ".0",
        "00",
        "-1",
        "*",
        "[02]",
        "!0",
        "\uff10",
        "\u0660",
        "\ud800",
        "\0",
        "a" * 10**6,
        "0." * 10**5,
    ),
    *("<script>alert(1)</script>", "a\nb" * 1000, "\x1b[31m"),
)


@pytest.mark.parametrize("field", ["name", "placement", "init", "activation", "gate", "block"])
def test_names_are_looked_up_and_nothing_else(field: str) -> None:
    for name in NAMES:
        message = refusal(changed(**{field: name}, **({"latent_channels": None} if field == "block" else {})))
        assert is_clear(message), f"{name!r:.60}: {message}"
        assert field in message or field == "name"


def test_names_of_one_table_are_none_of_another() -> None:
    tables = {"placement": PLACEMENTS, "activation": ACTIVATIONS, "gate": GATES}
    for field in tables:
        for other in tables.keys() - {field}:
            for name in tables[other]:
                assert is_clear(refusal(changed(**{field: name}))), (field, name)


SIZES = (10**12, 2**62, 2**64, 2**20 + 1, 2**20, 4097, 1025)


@pytest.mark.parametrize("field", ["channels", "latent_channels"])
def test_sizes_take_no_memory(field: str) -> None:
    def read() -> None:
        for size in SIZES:
            message = refusal(changed(**{field: size}))
            assert is_clear(message), message

    assert peak_bytes(read, torch.device("cpu")) < 2**20


def test_a_million_sites_are_refused_at_once() -> None:
    message = refusal({"version": 1, "sites": SAVED["sites"][:1] * 10**6})
    assert message == "plan['sites']: expected at most 65536 sites, and got 1000000"


@pytest.mark.usefixtures("tables")
def test_factories_are_not_asked_for_what_the_model_does_not_have() -> None:
    asked = []

    def factory(channels: int) -> nn.Module:
        asked.append(channels)
        return nn.Identity()

    BLOCKS["mine"] = factory
    mine = {"block": "mine", "latent_channels": None}
    for data in (changed(**mine, channels=2**20), changed(**mine, name="elsewhere"), changed(1, **mine, placement="residual")):
        assert is_clear(refusal(data))
    assert asked == []
    assert refusal(changed(**mine)).startswith("accepted")
    assert set(asked) == {16}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_largest_plan_there_is_fits_in_memory(name: str) -> None:
    """What a plan can ask for at most: 8 C^2 weights a block, or 2048 C, with the C of the model's own layers."""
    model = get_model(name, weights=None).to("meta")
    data = se_fx.plan(model, min_channels=1, latent_channels=1).to_dict()
    for site in data["sites"]:
        site["latent_channels"] = max(1024, 4 * site["channels"])
    widest = Plan.from_dict(data)
    assert len(se_fx.Plan.of(se_fx.transform(model, widest))) == len(data["sites"])
    assert 4 * widest.added.params < 2**30
    data["sites"][-1]["latent_channels"] += 1
    with pytest.raises(SqueezeExciteError, match=r"latent_channels=\d+: expected a hidden width of at most \d+"):
        Plan.from_dict(data)
