"""What Squeeze-and-Excitation (SE) costs in ONNX Runtime and OpenVINO, and whether optimising first takes any of it off.

    pip install -e '.[examples,onnx,exporters]'
    python examples/benchmarks/engines.py                                         # three networks, both engines, one image
    python examples/benchmarks/engines.py --networks seresnet50 --engines onnxruntime --rounds 61

For each network and engine, side by side in one run (`se_fx.bench`): without SE, with SE, and with SE after
``se_fx.optimize_for_inference(model, x, target="export")``. All are exported to ONNX; float32, 224 x 224. Then each engine's
own profiler tells where the time of a call goes, by kind of operator: what SE adds is the difference of two columns.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inference
import timm
import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import se_fx

NETWORKS = ["seresnet50", "efficientnet_b0", "mobilenetv3_large_100"]
SE, OPTIMIZED, CALLS = "with SE", "optimised", 20


class Engine(nn.Module):
    """What an engine has made of a model, called with tensors.

    Args:
        run: one call, of arrays.
        profile: milliseconds of one call by kind of operator.
    """

    def __init__(self, run: Callable[[Any], Any], profile: Callable[[Any], Counter[str]]) -> None:
        super().__init__()
        self.run, self.profile = run, profile

    def __deepcopy__(self, memo: object) -> Engine:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.run(x.numpy()))


def onnxruntime(path: Path) -> Engine:
    import onnxruntime as ort

    def session(profiling: bool) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = torch.get_num_threads(), profiling
        options.profile_file_prefix = str(path.with_suffix(""))
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    plain = session(False)
    name = plain.get_inputs()[0].name

    def profile(x: Any) -> Counter[str]:
        profiled = session(True)
        for _ in range(CALLS):
            profiled.run(None, {name: x})
        events = json.loads(Path(profiled.end_profiling()).read_text())
        found: Counter[str] = Counter()
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                found[event["args"]["op_name"]] += event["dur"] / 1e3 / CALLS
        return found

    return Engine(lambda x: plain.run(None, {name: x})[0], profile)


def openvino(path: Path) -> Engine:
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    plain = core.compile_model(core.read_model(path), "CPU", settings)

    def profile(x: Any) -> Counter[str]:
        request = core.compile_model(core.read_model(path), "CPU", {**settings, "PERF_COUNT": True}).create_infer_request()
        found: Counter[str] = Counter()
        for _ in range(CALLS):
            request.infer([x])
            for each in request.get_profiling_info():
                found[each.node_type] += each.real_time.total_seconds() * 1e3 / CALLS
        return found

    return Engine(lambda x: copy.copy(plain([x])[0]), profile)


ENGINES: dict[str, Callable[[Path], Engine]] = {"onnxruntime": onnxruntime, "openvino": openvino}


def networks(name: str, x: Tensor) -> dict[str, nn.Module]:
    """Without SE, with, and optimised."""
    torch.manual_seed(0)
    plain, *_ = next(group.values() for group in inference.GROUPS.values() if name in group)
    model = inference.lively(timm.create_model(name))
    optimized = se_fx.optimize_for_inference(model, x, target="export")
    return {"without SE": inference.lively(plain()), SE: model, OPTIMIZED: optimized}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--batch-size", type=int, default=1, metavar="N", help="images in a call (default: 1)")
    add("--rounds", type=int, default=31, metavar="N", help="timings of each model (default: 31)")
    add("--operators", type=int, default=6, metavar="N", help="kinds of operators in the second table (default: 6)")
    arguments = parser.parse_args()
    x = torch.randn(arguments.batch_size, 3, inference.SIZE, inference.SIZE, generator=torch.Generator().manual_seed(0))
    times, machine = [], ""
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(arguments.networks, unit="network"):
            paths = {}
            for kind, model in networks(name, x).items():
                paths[kind] = Path(folder) / f"{name}-{len(paths)}.onnx"
                torch.onnx.export(model, (x,), paths[kind], dynamo=True, verbose=False)
            for engine in arguments.engines:
                engines: dict[str, nn.Module] = {kind: ENGINES[engine](path) for kind, path in paths.items()}
                result = se_fx.bench(
                    engines, x, batch_sizes=(len(x),), rounds=arguments.rounds, min_seconds=0.2, progress=False
                )
                plain, with_se, optimized = result.rows
                ratios = with_se, optimized, optimized.against(with_se)
                spread = [f"{row.ratio:.3f} ({row.ratio_iqr[0]:.2f} to {row.ratio_iqr[1]:.2f})" for row in ratios]
                times.append([name, engine, f"{1e3 * plain.median:.1f}", *spread])
                machine = result.machine
                profiles = {kind: made.profile(x.numpy()) for kind, made in engines.items() if isinstance(made, Engine)}
                tqdm.write(
                    f"\n{name}, {engine}, ms of a call by kind of operator\n{by_operator(profiles, arguments.operators)}"
                )
    headers = ["network", "engine", "without SE, ms", "SE to without", "optimised to without", "optimised to SE"]
    print(f"\n{tabulate(times, headers, 'github', disable_numparse=True)}\n\n{machine}, rounds: {arguments.rounds}")


def by_operator(profiles: dict[str, Counter[str]], most: int) -> str:
    """A table of the operators whose times differ most, and of the rest."""
    kinds = sorted(set().union(*profiles.values()), key=lambda kind: -abs(profiles[SE][kind] - profiles["without SE"][kind]))
    rows = [[kind, *(f"{profile[kind]:.2f}" for profile in profiles.values())] for kind in kinds[:most]]
    rest = (sum(profile[kind] for kind in kinds[most:]) for profile in profiles.values())
    total = (sum(profile.values()) for profile in profiles.values())
    rows += [["others", *(f"{each:.2f}" for each in rest)], ["all", *(f"{each:.2f}" for each in total)]]
    return tabulate(rows, ["operator", *profiles], "github", disable_numparse=True)


if __name__ == "__main__":
    main()
