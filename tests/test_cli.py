"""The command line, as a shell sees it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from torch import nn

from se_fx.cli import main


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 512, 1))


def fails() -> nn.Module:
    raise RuntimeError("no such weights")


not_a_model = 3


def test_report_of_a_torchvision_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "resnet18", "--min-channels", "512", "--input", "1,3,224,224"]) == 0
    out = capsys.readouterr().out
    assert "ResNet: 5 Squeeze-and-Excitation blocks inserted." in out
    assert "1,814,073,344" in out


def test_report_of_a_timm_model_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "timm:resnet18", "--min-channels", "auto", "--latent-channels", "1/16", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {(site["channels"], site["latent_channels"]) for site in data["sites"]} == {(512, 32)}


def test_plan_of_a_callable(capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"{__name__}:build"
    assert main(["plan", spec, "--where", "*", "--where", "!0"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "1 site, 1 Conv2d layers skipped"
    assert main(["plan", spec, "--json"]) == 0
    assert [site["name"] for site in json.loads(capsys.readouterr().out)["sites"]] == ["0", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "resnet51"], "MODEL 'resnet51': there is no such model; did you mean resnet"),
        (["report", "xyzzy"], "MODEL 'xyzzy': there is no such model; expected a torchvision model, timm:NAME"),
        (["report", "timm:resnet51z"], "MODEL 'resnet51z': there is no such model; did you mean resnet51"),
        (["report", "no_such_package:build"], "MODEL 'no_such_package:build': can't import 'no_such_package'"),
        (["report", f"{__name__}:nothing"], "has no 'nothing'"),
        (["report", f"{__name__}:fails"], "calling it failed: RuntimeError: no such weights"),
        (["report", f"{__name__}:not_a_model"], "calling it failed: TypeError"),
        (["report", "resnet18", "--min-channels", "0"], "min_channels=0: expected"),
        (["report", "resnet18", "--latent-channels", "1.5"], "latent_channels=1.5: expected"),
        (["report", "resnet18", "--placement", "nowhere"], "placement='nowhere': expected one of 'conv'"),
        (["report", "resnet18", "--gate", "tanh"], "gate='tanh': expected one of"),
        (
            ["report", "resnet18", "--input", "1,4,64,64"],
            "example_inputs: the model could not be called with inputs (1, 4, 64, 64)",
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("se-fx: error: ")
    assert message in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["report"], "the following arguments are required: MODEL"),
        (["report", "resnet18", "--input", "1,x"], "'1,x': expected a shape such as 1,3,224,224"),
        (["report", "resnet18", "--input", "1,-3"], "'1,-3': expected a shape"),
        (["report", "resnet18", "--min-channels", "many"], "'many': expected an integer or auto"),
        (["report", "resnet18", "--latent-channels", "1/0"], "'1/0': expected a width such as 64 or a fraction"),
        (["report", "resnet18", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_usage_is_status_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["report", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert "se-fx report resnet50 --min-channels 512 --input 1,3,224,224" in out
        assert "exit status" in out


def test_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "se_fx", "report", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("se-fx: error: MODEL 'nothing'")
