"""The command line, as a shell sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import se_fx
from se_fx.cli import main, parser


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 512, 1))


def fails() -> nn.Module:
    raise RuntimeError("no such weights")


def needs(argument: int) -> nn.Module:
    return build()


not_a_model = 3


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 3, 8, 8), torch.randn(4, 512, 6, 6))] * 2


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


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
    assert capsys.readouterr().out.splitlines()[0] == "1 site, 1 Conv2d layer skipped"
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
    assert json.loads(capsys.readouterr().out)["options"] == {
        "placement": "residual",
        "min_channels": 512,
        "latent_channels": 64,
    }


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
    drawn = {key: value for key, value in se_fx.transform(build(), seed=7).state_dict().items() if "squeeze_excite" in key}
    assert drawn
    assert all(torch.equal(state[key], value) for key, value in drawn.items())
    assert main(["transform", f"{__name__}:build", "--seed", "-1", "--save", str(saved)]) == 2
    assert "seed=-1: expected an integer" in capsys.readouterr().err


def test_files_of_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "parts.py").write_text("from torch import nn\n\nconvs = [nn.Conv2d(3, 256, 1)]\n")
    file = tmp_path / "its_models.py"
    file.write_text("import parts\nfrom torch import nn\n\ndef build():\n    return nn.Sequential(*parts.convs)\n")
    assert main(["plan", f"{file}:build", "--json"]) == 0
    assert [site["name"] for site in json.loads(capsys.readouterr().out)["sites"]] == ["0"]
    assert main(["plan", f"{file}:make"]) == 2
    assert f"{file} has no 'make'" in capsys.readouterr().err


def test_scores_and_the_best_for_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "trained.pt"
    torch.save(build().state_dict(), weights)
    here = [f"{__name__}:{name}" for name in ("build", "batches", "loss")]
    command = ["score", here[0], "--checkpoint", str(weights), "--batches", here[1], "--loss", here[2], "--json"]
    assert main(command) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert list(scores) == ["0", "2"]
    assert all(score >= 0 for score in scores.values())
    assert max(scores.values()) > 0
    assert main([*command, "--budget", "params=40000"]) == 0  # 2 x 256 x 64
    assert [site["name"] for site in json.loads(capsys.readouterr().out)["sites"]] == ["0"]
    assert main([*command, "--budget", "params=1"]) == 1


def test_optimize_and_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, onnx, program = (tmp_path / name for name in ("se.pt", "fast.onnx", "fast.pt2"))
    assert main(["transform", f"{__name__}:build", "--save", str(saved)]) == 0
    read = torch.load(saved, weights_only=True)
    gm = se_fx.transform(build(), se_fx.Plan.from_dict(read["plan"])).eval()
    gm.load_state_dict(read["state_dict"])
    x = torch.randn(3, 3, 8, 8)
    capsys.readouterr()
    command = ["optimize", f"{__name__}:build", "--checkpoint", str(saved), "--input", "1,3,8,8", "--dynamic-batch"]
    assert main([*command, "--onnx", str(onnx), "--pt2", str(program)]) == 0
    assert capsys.readouterr().out.endswith(f"Written to {program}.\n\nWritten to {onnx}.\n")
    session = pytest.importorskip("onnxruntime").InferenceSession(onnx)
    (name,) = (each.name for each in session.get_inputs())
    # Rounding of other kernels.
    torch.testing.assert_close(torch.from_numpy(session.run(None, {name: x.numpy()})[0]), gm(x).detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.export.load(program).module()(x), gm(x), rtol=1e-3, atol=1e-5)
    assert main(["optimize", f"{__name__}:build"]) == 1  # no attention in it


def test_whole_models_only_if_they_are_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole.pt"
    torch.save(build(), whole)
    assert main(["plan", str(whole)]) == 2
    assert "may do anything when it is loaded; if you trust it, say --trust-pickle" in capsys.readouterr().err
    assert main(["plan", str(whole), "--trust-pickle"]) == 0
    torch.save(build().state_dict(), whole)
    assert main(["plan", str(whole), "--trust-pickle"]) == 2
    assert "expected the file to hold an nn.Module, and got OrderedDict" in capsys.readouterr().err


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


# --------------------------------------------------------------------------------------------------------------- bad input
SPEC = f"{__name__}:build"
COMMANDS = ("report", "plan", "suggest", "score", "transform", "optimize", "bench")
WITH_OPTIONS = ("report", "plan", "score", "transform", "bench")
REQUIRED = {"transform": ("--save", "se.pt"), "score": ("--batches", f"{__name__}:batches")}

#: Command, option (or argument), the words after it, what the message says.
ROWS: list[tuple[str, str, tuple[str, ...], str]] = [
    *(
        (command, "MODEL", (), "the following arguments are required: MODEL")
        for command in ("report", "plan", "suggest", "optimize", "bench")
    ),
    ("score", "MODEL", (), "the following arguments are required: MODEL"),
    *(
        ("report", "MODEL", (spec,), f"MODEL {spec.removeprefix('timm:')!r}: {message}")
        for spec, message in (
            ("resnet51", "there is no such model; did you mean resnet"),
            (
                "xyzzy",
                "there is no such model; expected a torchvision model, timm:NAME, package.module:callable or file.py:callable",
            ),
            ("", "there is no such model; expected"),
            ("a\nb", "there is no such model"),
            ("timm:resnet51z", "there is no such model; did you mean resnet51"),
            ("no_such_file.py:build", "can't import 'no_such_file.py': FileNotFoundError"),
            ("broken.py:build", "can't import 'broken.py': SyntaxError"),
            ("program.pt2", "a program of torch.export has operators, and no nn.Conv2d"),
            ("no_such_package:build", "can't import 'no_such_package': ModuleNotFoundError"),
            ("..:build", "can't import '..': TypeError"),
            ("broken:build", "can't import 'broken': SyntaxError"),
            (f"{__name__}:nothing", f"{__name__} has no 'nothing'"),
            (f"{__name__}:", f"{__name__} has no ''"),
            (f"{__name__}:fails", "calling it failed: RuntimeError: no such weights"),
            (f"{__name__}:not_a_model", "calling it failed: TypeError"),
            (f"{__name__}:needs", "calling it failed: TypeError"),
            ("builtins:dict", "expected it to return an nn.Module, and got dict"),
        )
    ),
    *((command, "MODEL", ("torch.nn:Identity",), "model: Identity has no nn.Conv2d") for command in WITH_OPTIONS),
    ("plan", "MODEL", ("vgg11", "--placement", "residual"), "placement='residual': the graphs of VGG have no such place"),
    *(
        (command, "--input", (SPEC, "--input", shape), f"{shape!r}: expected a shape such as 1,3,224,224")
        for command in COMMANDS
        for shape in ("", "1,x", "1,-3", "1,3,999999999,99999999999", f"1,{10**30}")
    ),
    *(
        (
            command,
            "--input",
            (SPEC, "--input", "1,4,8,8"),
            "example_inputs: the model could not be called with inputs (1, 4, 8, 8)",
        )
        for command in ("report", "plan", "suggest", "score", "optimize")
    ),
    *((command, "--trust-pickle", (SPEC, "--trust-pickle=1"), "argument --trust-pickle: ignored") for command in COMMANDS),
    *((command, "--trust-pickle", ("whole.pt",), "if you trust it, say --trust-pickle") for command in COMMANDS),
    ("report", "--trust-pickle", ("empty.pt", "--trust-pickle"), "MODEL 'empty.pt': can't be loaded: EOFError"),
    *(
        ("score", option, (SPEC, *(() if option == "--batches" else REQUIRED["score"]), option, value), message)
        for option, value, message in (
            ("--batches", "batches", "--batches 'batches': expected package.module:name or path/to/file.py:name"),
            ("--batches", "no_such_package:b", "--batches 'no_such_package:b': can't import 'no_such_package'"),
            ("--batches", f"{__name__}:fails", "calling it failed: RuntimeError: no such weights"),
            ("--batches", f"{__name__}:not_a_model", "batches"),
            ("--loss", "l1", "--loss 'l1': expected package.module:name or path/to/file.py:name"),
            ("--loss", f"{__name__}:not_a_model", "loss"),
            ("--saliency", "size", "saliency='size'"),
        )
    ),
    *(
        ("optimize", option, (SPEC, *words), message)
        for option, words, message in (
            ("--target", ("--target", "phone"), "target='phone': expected"),
            ("--onnx", ("--onnx", "x.onnx"), "--onnx, --pt2: the shape of an input is needed"),
            ("--onnx", ("--input", "1,3,8,8", "--onnx", "no/such/x.onnx"), "no/such/x.onnx"),
            ("--pt2", ("--pt2", "x.pt2"), "--onnx, --pt2: the shape of an input is needed"),
            ("--pt2", ("--input", "1,3,8,8", "--pt2", "no/such/x.pt2"), "No such file or directory: 'no/such/x.pt2'"),
            ("--dynamic-batch", ("--dynamic-batch=1",), "argument --dynamic-batch: ignored"),
        )
    ),
    ("bench", "--input", (SPEC, "--input", "1,4,8,8"), "models['original']: inference (eager) failed with inputs (1, 4, 8, 8)"),
    ("bench", "--input", (SPEC, "--input", "1,3,99999999,9999999"), "--input: no tensor of this shape can be made"),
    *((command, "--json", (SPEC, "--json=3"), "argument --json: ignored explicit argument '3'") for command in COMMANDS),
    *(
        (command, option, (SPEC, option, value) if value else (SPEC, option), message)
        for command in WITH_OPTIONS
        for option, value, message in (
            ("--min-channels", "0", "min_channels=0: expected the least number"),
            ("--min-channels", "many", "min_channels='many': expected the least number"),
            ("--latent-channels", "1.5", "latent_channels=1.5: expected a hidden width"),
            ("--latent-channels", "nan", "latent_channels=nan: expected a hidden width"),
            ("--latent-channels", "9" * 30, "expected a hidden width of at most"),
            ("--latent-channels", "1/0", "'1/0': expected a width such as 64 or a fraction"),
            ("--latent-channels", "1/2/3", "'1/2/3': expected a width such as 64 or a fraction"),
            ("--placement", "nowhere", "placement='nowhere': expected one of 'conv'"),
            ("--where", "layr*", "where=['layr*']: 'layr*' matches no Conv2d; the first is named '0'"),
            ("--stages", "layr4", "stages=['layr4']: 'layr4': no module of this name holds a Conv2d; stages are 0 (0"),
            ("--stages", "9", "stages=[9]: 9: there are 1: 0 (0"),
            ("--necks=yes", "", "argument --necks/--no-necks: ignored explicit argument 'yes'"),
            ("--no-necks=yes", "", "argument --necks/--no-necks: ignored explicit argument 'yes'"),
            ("--block", "senet", "block='senet': expected one of 'eca'"),
            ("--init", "ones", "init='ones': expected one of 'default', 'identity'"),
            ("--bias=yes", "", "argument --bias: ignored explicit argument 'yes'"),
            ("--activation", "swish", "activation='swish': expected one of 'relu'"),
            ("--gate", "tanh", "gate='tanh': expected one of 'sigmoid'"),
            ("--budget", "flops", "'flops': expected flops=, params= or bytes="),
            ("--budget", "time=1%", "'time=1%': expected flops="),
            ("--budget", "flops=100%", "'flops=100%': expected flops="),
            ("--budget", "flops=-1", "'flops=-1': expected flops="),
            ("--budget", "params=nan", "'params=nan': expected flops="),
            ("--budget", "params=inf", "params=inf: expected a number of params"),
            ("--budget", "flops=1%", "flops: this plan has no costs yet"),
            ("--nonsense", "", "unrecognized arguments: --nonsense"),
        )
    ),
    ("report", "--html", (SPEC, "--html", ""), "path='': expected the path of a file"),
    ("report", "--html", (SPEC, "--html", "no/such/folder.html"), "No such file or directory: 'no/such/folder.html'"),
    ("report", "--roofline", (SPEC, "--roofline"), "--roofline: costs are needed; give the shape of an input"),
    ("transform", "--save", (SPEC,), "the following arguments are required: --save"),
    ("transform", "--save", (SPEC, "--save", ""), "No such file or directory: ''"),
    ("transform", "--save", (SPEC, "--save", "no/such/folder.pt"), "No such file or directory: 'no/such/folder.pt'"),
    *(
        ("transform", "--seed", (SPEC, "--seed", seed), message)
        for seed, message in (("x", "argument --seed: invalid int value: 'x'"), ("-1", "seed=-1: expected an integer from 0"))
    ),
    *((command, "--checkpoint", (SPEC, "--checkpoint", "nothing.pt"), "No such file or directory") for command in COMMANDS),
    *(
        ("transform", "--checkpoint", (SPEC, "--checkpoint", file), message)
        for file, message in (
            ("", "No such file or directory: ''"),
            ("nothing.pt", "No such file or directory: 'nothing.pt'"),
            ("broken.py", "--checkpoint broken.py: expected a state_dict that torch.save has written"),
            ("empty.pt", "--checkpoint empty.pt: expected a state_dict that torch.save has written"),
            (
                "whole.pt",
                "--checkpoint whole.pt: expected a state_dict that torch.save has written: pickled models",
            ),
            ("number.pt", f"--checkpoint number.pt: does not fit {SPEC}: AttributeError"),
            ("list.pt", f"--checkpoint list.pt: does not fit {SPEC}: TypeError"),
            (
                "other.pt",
                f"--checkpoint other.pt: does not fit {SPEC}: RuntimeError: Error(s) in loading",
            ),
        )
    ),
    *(
        ("bench", option, (SPEC, "--input", "1,3,8,8", option, *value), message)
        for option, value, message in (
            ("--batch-sizes", ["0"], "batch_sizes=[0]: expected integers >= 1"),
            ("--batch-sizes", ["x"], "argument --batch-sizes: invalid int value: 'x'"),
            ("--rounds", ["0"], "rounds=0: expected an integer >= 1"),
            ("--rounds", ["x"], "argument --rounds: invalid int value: 'x'"),
            ("--device", ["gpu"], "device='gpu': expected such as 'cpu' or 'cuda:0'"),
            ("--device", [""], "device='': expected such as 'cpu' or 'cuda:0'"),
            ("--device", ["cuda:99"], "device='cuda:99': expected 'cpu', or a CUDA device that this"),
            ("--device", ["meta"], "device='meta': expected 'cpu', or a CUDA device that this machine has"),
            *(
                (f"{flag}=1", "", f"argument {flag}: ignored")
                for flag in ("--compiled", "--training", "--channels-last", "--bf16")
            ),
        )
    ),
]


def run(arguments: list[str]) -> int | str | None:
    """The exit status, however the command exits."""
    try:
        return main(arguments)
    except SystemExit as exit_:
        return exit_.code


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_input_is_one_clear_line_and_status_2(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def build(:\n")
    (tmp_path / "empty.pt").touch()
    contents = {"whole": build(), "number": 3, "list": {"state_dict": [1]}, "other": nn.Conv2d(3, 8, 1).state_dict()}
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
    before = sorted(tmp_path.iterdir())
    faults = []
    for _, option, words, message in (row for row in ROWS if row[0] == command):
        arguments = [command, *words, *(() if option in ("--save", "--batches") else REQUIRED.get(command, ()))]
        status = run(arguments)
        out, error = capsys.readouterr()
        *usage, last = error.replace("\r", "\n").strip("\n").split("\n")
        if status != 2 or out or message not in last or not last.startswith("se-fx"):
            faults.append(f"{arguments}: {status}: {error}")
        elif any(usage) and not usage[0].startswith(("usage: se-fx", "bench: ")):
            faults.append(f"{arguments}: more than one line: {error}")
    assert not faults, "\n".join(faults)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


def test_no_option_is_without_bad_input() -> None:
    (commands,) = (action for action in parser()._actions if action.dest == "command")
    options = {
        (name, (action.option_strings or [action.metavar])[-1])
        for name, command in commands.choices.items()
        for action in command._actions
        if action.dest != "help"
    }
    assert options <= {(command, option.split("=")[0]) for command, option, _, _ in ROWS}
    assert run([]) == 2
    assert run(["--nope"]) == 2
    assert run(["nope"]) == 2


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], *([command, "--help"] for command in COMMANDS)):
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
