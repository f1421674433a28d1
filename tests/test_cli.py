"""The command line, as a shell sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import se_fx
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


def test_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    paper = ["plan", "resnet18", "--placement", "residual", "--min-channels", "1", "--input", "1,3,64,64"]
    assert main([*paper, "--budget", "params=1%", "--budget", "flops=1e6"]) == 0
    assert 0 < int(capsys.readouterr().out.split()[0]) < 8
    assert main([*paper, "--budget", "params=0"]) == 1  # nothing fits
    assert capsys.readouterr().out.startswith("0 sites")


def test_suggest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suggest", "resnet18", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"] == {"min_channels": 512, "latent_channels": 64}


def test_roofline(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"{__name__}:build", "--input", "1,3,16,16", "--roofline"]) == 0
    assert "Estimated, not measured" in capsys.readouterr().out
    assert main(["report", f"{__name__}:build", "--roofline"]) == 2
    assert "--input" in capsys.readouterr().err


def test_transform_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, saved = tmp_path / "plain.pt", tmp_path / "se.pt"
    model = build()
    torch.save(model.state_dict(), plain)
    spec = f"{__name__}:build"
    assert main(["transform", spec, "--checkpoint", str(plain), "--init", "identity", "--save", str(saved)]) == 0
    assert "weights_only=True" in capsys.readouterr().out
    read = torch.load(saved, weights_only=True)
    gm = se_fx.transform(build(), se_fx.Plan.from_dict(read["plan"]))
    gm.load_state_dict(read["state_dict"])
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(gm(x), model(x))
    assert main(["transform", "resnet18", "--checkpoint", str(plain), "--save", str(saved)]) == 2
    assert "does not fit resnet18" in capsys.readouterr().err
    assert main(["transform", spec, "--save", str(tmp_path / "no" / "such" / "folder.pt")]) == 2
    assert main(["transform", spec, "--min-channels", "5000", "--save", str(saved)]) == 1


def test_transform_from_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "se.pt"
    assert main(["transform", f"{__name__}:build", "--seed", "7", "--save", str(saved)]) == 0
    state = torch.load(saved, weights_only=True)["state_dict"]
    drawn = se_fx.transform(build(), seed=7).squeeze_excite.state_dict()
    assert drawn
    assert all(torch.equal(state[f"squeeze_excite.{key}"], value) for key, value in drawn.items())
    assert main(["transform", f"{__name__}:build", "--seed", "-1", "--save", str(saved)]) == 2
    assert "seed=-1: expected an integer" in capsys.readouterr().err


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"{__name__}:build"
    assert main(["bench", spec, "--input", "1,3,8,8", "--rounds", "2", "--batch-sizes", "1", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(row["model"], row["batch_size"]) for row in rows} == {
        ("original", 1),
        ("original", 2),
        ("rewritten", 1),
        ("rewritten", 2),
    }


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
        (["report", "resnet18", "--min-channels", "many"], "min_channels='many': expected"),
        (["report", "resnet18", "--latent-channels", "1.5"], "latent_channels=1.5: expected"),
        (["report", "resnet18", "--placement", "nowhere"], "placement='nowhere': expected one of 'conv'"),
        (["plan", "resnet18", "--budget", "flops=1%"], "flops: this plan has no costs yet"),
        (["plan", "vgg11", "--placement", "residual"], "placement='residual': the graphs of VGG have no such place"),
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
        (["report", "resnet18", "--latent-channels", "1/0"], "'1/0': expected a width such as 64 or a fraction"),
        (["plan", "resnet18", "--budget", "flops"], "'flops': expected flops=, params= or bytes="),
        (["plan", "resnet18", "--budget", "time=1%"], "'time=1%': expected flops="),
        (["plan", "resnet18", "--budget", "flops=100%"], "'flops=100%': expected"),
        (["plan", "resnet18", "--budget", "flops=-1"], "'flops=-1': expected"),
        (["transform", "resnet18"], "required: --save"),
        (["report", "resnet18", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_usage_is_status_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], *([command, "--help"] for command in ("report", "plan", "suggest", "transform", "bench"))):
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
