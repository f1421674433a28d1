"""The example that gathers evidence on real images: it can be stopped and shared, and what its tables say is so."""

from __future__ import annotations

import argparse
import gzip
import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import comparison
import digits
import evidence
import fashion_mnist
import matplotlib.image
import pytest
import scipy.stats
import torch
import train

import se_fx


# ------------------------------------------------------------------------------------------------------- Debian's packed images
def pack(folder: Path, first: int) -> None:
    """Sixty digits from the first on, as the packed files of Fashion-MNIST."""
    images, labels = digits.digits(28)[0]
    pixels = ((images[first : first + 60, 0] + 1) * 127.5).byte().numpy().tobytes()
    folder.mkdir()
    for name in fashion_mnist.NAMES:
        if "images" in name:
            content = struct.pack(">4i", 2051, 60, 28, 28) + pixels
        else:
            content = struct.pack(">2i", 2049, 60) + labels[first : first + 60].byte().numpy().tobytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))


def test_packed_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack(tmp_path / "one", 0)
    pack(tmp_path / "other", 60)
    raw = tmp_path / "cache" / "se_fx" / "FashionMNIST" / "raw"

    def labels(root: str) -> list[int]:
        arguments = train.parsed(["--dataset", "FashionMNIST", "--root", str(tmp_path / root)])
        (images, found), _, _ = train.dataset(arguments)
        assert images.shape == (60, 3, 28, 28)
        return sorted(found.tolist())

    expected = digits.digits(28)[0][1]
    assert labels("one") == sorted(expected[:60].tolist())
    assert sorted(path.name for path in raw.iterdir()) == sorted(fashion_mnist.NAMES)
    assert len(list((tmp_path / "one").iterdir())) == 4  # nothing is written there

    times = {path.name: path.stat().st_mtime_ns for path in raw.iterdir()}
    labels_file = raw / "train-labels-idx1-ubyte"
    labels_file.write_bytes(labels_file.read_bytes()[:-1])  # as a disk that was full leaves it
    assert labels("one") == sorted(expected[:60].tolist())
    assert {path.name for path in raw.iterdir() if path.stat().st_mtime_ns != times[path.name]} == {labels_file.name}
    assert labels("other") == sorted(expected[60:120].tolist())  # not what the cache had


def test_what_cannot_be_unpacked_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack(tmp_path / "one", 0)
    broken = tmp_path / "one" / f"{fashion_mnist.NAMES[0]}.gz"
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(EOFError):
        fashion_mnist.unpacked(str(tmp_path / "one"))
    assert not list((tmp_path / "cache").rglob("*ubyte*"))


@pytest.mark.parametrize(
    ("dataset", "said"), [("FashionMNIST", "apt-get install dataset-fashion-mnist"), ("MNIST", "--download")]
)
def test_no_images_are_said(dataset: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"{re.escape(str(tmp_path))}.*\n.*{said}"):
        train.dataset(train.parsed(["--dataset", dataset, "--root", str(tmp_path)]))


# -------------------------------------------------------------------------------------------------------------- experiments
@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks take half as much time again, unmeasured."""
    monkeypatch.setattr(se_fx, "bench", lambda *_, **__: SimpleNamespace(rows=[None, SimpleNamespace(ratio=5 / 3)]))


def conducted(out: Path, *words: str) -> list[evidence.Record]:
    evidence.main([*words, "--tiny", "--out", str(out)])
    return evidence.read(out / "runs.jsonl")


@pytest.mark.usefixtures("quick")
def test_runs_are_shared_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = conducted(tmp_path, "from-scratch", "--shard", "1/2")
    assert len(half) == 6
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]) + '{"experiment": "from-scr')  # killed
    records = conducted(tmp_path, "from-scratch", "--shard", "2/2")
    assert len(records) == 11
    records = conducted(tmp_path, "from-scratch")
    assert len({evidence.key_of(record) for record in records}) == len(records) == 12
    again = [record for record in records if evidence.key_of(record) == evidence.key_of(half[-1])]
    assert [record["accuracy"] for record in again] == [half[-1]["accuracy"]]  # a seed decides it

    monkeypatch.setattr(evidence.Laboratory, "run", lambda *_: pytest.fail("this run was there"))
    before = path.read_bytes()
    capsys.readouterr()
    conducted(tmp_path, "from-scratch")
    printed = capsys.readouterr().out
    assert path.read_bytes() == before
    assert evidence.main(["tables", "--out", str(tmp_path)]).strip() == printed.strip()
    for placement in ("residual", "conv"):
        runs = {record["side"]: record for record in records if placement in record["group"]}
        plain, longer, with_se = runs["none, as many parameters"], runs["none, in as much time"], runs["SE"]
        assert (plain["steps"], longer["steps"], with_se["steps"]) == (3, 5, 3)
        assert longer["params"] < with_se["params"] == pytest.approx(plain["params"], rel=0.02)
        assert not plain["sites"]
        assert len(with_se["sites"]) == (3 if placement == "residual" else 9)


def test_blocks_are_compared_with_networks_as_large(tmp_path: Path) -> None:
    records = conducted(tmp_path, "blocks", "--plot", str(tmp_path / "plots"))
    sides = {record["side"]: record for record in records}
    assert [name for name in sides if not name.startswith("none")] == ["SE", "ECA", "CBAM", "ESE"]
    for name in evidence.BLOCKS:
        side = sides[name]
        assert len(side["sites"]) == 3
        assert side["against"][0] == "none"
        assert side["params"] > sides["none"]["params"]
        assert sides[side["against"][-1]]["params"] == pytest.approx(side["params"], rel=0.02)
        assert sum(record["side"] == name for record in records) == 2
    assert matplotlib.image.imread(tmp_path / "plots" / "blocks.png")[..., :3].std() > 0.05


@pytest.mark.integration
def test_choices_of_sites_cost_alike(tmp_path: Path) -> None:
    records = conducted(tmp_path, "score", "--units", "2")
    for group in ("frozen, noisy images", "from scratch"):
        runs = [record for record in records if record["group"] == group]
        assert len(runs) == 12
        plain = next(run["params"] for run in runs if run["side"] == "none")
        every = next(run["params"] for run in runs if run["side"] == "all")
        for run in runs:
            if run["side"] in ("cheapest", "last", "random", "score"):
                assert 0 < run["params"] - plain <= round(0.51 * (every - plain))
        assert {run["side"]: len(run["sites"]) for run in runs}["all"] == 6
        assert next(run for run in runs if run["side"] == "last")["sites"][-1].startswith("6.")


def test_frozen_networks_see_changed_images() -> None:
    lab = evidence.Laboratory(evidence.parsed(["score", "--tiny"]))
    images = lab.training[0][:5]
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(lab.changed(images, generator), images)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(lab.held_out(True), lab.held_out(True), strict=True))
    assert torch.equal(lab.held_out(False)[0][0], lab.test[0][:500])


@pytest.mark.parametrize("choice", ["all", "cheapest", "last", "random"])
def test_only_blocks_of_frozen_networks_learn(choice: str, tmp_path: Path) -> None:
    lab = evidence.Laboratory(evidence.parsed(["score", "--tiny", "--out", str(tmp_path)]))
    model = evidence.placed(lab, choice, True, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train.trained(model, lab.training, 2, 0, lab.arguments, lab.changed, lambda: None)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("squeeze_excite" in name for name in moved)


def test_a_file_is_made_once(tmp_path: Path) -> None:
    arguments = evidence.parsed(["score", "--tiny", "--out", str(tmp_path)])
    others = argparse.Namespace(**{**vars(arguments), "steps": 7})
    assert evidence.once(arguments, "steps", lambda: 5) == 5
    assert evidence.once(arguments, "steps", lambda: pytest.fail("it was there")) == 5
    assert evidence.once(others, "steps", lambda: 6) == 6

    def late() -> int:
        evidence.once(arguments, "other", lambda: 1)  # another process, meanwhile
        return 2

    assert evidence.once(arguments, "other", late) == 1
    assert len(list(tmp_path.iterdir())) == 3


def record(side: str, seed: int, accuracy: float, order: int, settings: dict[str, object]) -> evidence.Record:
    key = {"experiment": "blocks", "group": "a group", "side": side, "seed": seed, "settings": settings}
    against = ["none"] if side == "SE" else []
    return {
        **key,
        "order": order,
        "accuracy": accuracy,
        "params": 10,
        "steps": 3,
        "seconds": 1.5,
        "against": against,
    }


def test_tables_have_paired_intervals(tmp_path: Path) -> None:
    plain, with_se = (0.91, 0.93, 0.90, 0.92), (0.93, 0.94, 0.93, 0.93)
    path = tmp_path / "runs.jsonl"
    for seed in (2, 0, 3, 1):  # as processes happen to end
        evidence.append(path, record("SE", seed, with_se[seed], 1, {"steps": 3}))
        evidence.append(path, record("none", seed, plain[seed], 0, {"steps": 3}))
        evidence.append(path, record("SE", seed, 0.1, 1, {"steps": 4}))  # of other settings
    evidence.append(path, record("none", 4, 0.5, 0, {"steps": 3}))  # the other one of this seed isn't there yet
    printed = evidence.tables(evidence.read(path))
    low, high = scipy.stats.ttest_rel(with_se, plain).confidence_interval(0.95)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| SE")]
    assert cells[0][:4] == ["SE", "4", "10", "3"]
    assert cells[1] == ["SE", "none", f"+1.75 ± {100 * (high - low) / 2:.2f}", "4 of 4", "better"]
    assert cells[2] == ["SE", "4", "10", "3", "1.5", "10.00 ± 0.00"]  # with nothing to be compared with
    assert len(cells) == 3
    assert "steps 4" in printed


def test_verdict_of_no_difference() -> None:
    assert comparison.Comparison((0.9, 0.91), (0.91, 0.9)).found == comparison.UNDECIDED


def test_lines_of_processes_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"a": 1}) + '\n{"b": ')
    evidence.append(path, {"c": 3})
    evidence.append(path, {"d": 4})
    assert evidence.read(path) == [{"a": 1}, {"c": 3}, {"d": 4}]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b"])
def test_shards_are_checked(shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evidence.parsed(["score", "--shard", shard])
    assert "expected I/N" in capsys.readouterr().err
