"""What engines and quantizers of others make of a network, as it is and optimised: pieces, nodes, quantized convolutions.

    pip install -e '.[examples,onnx,exporters]'
    python examples/benchmarks/exporters.py seresnet18 torchvision/resnet18

Each row is one engine; what isn't installed, or raises, says so. Every result is compared with the network's.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import se_fx

X = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def settled(model: nn.Module) -> nn.Module:
    """With norms that do something, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.2)
    return model.eval()


def off(found: Any, expected: Tensor) -> str:
    """The largest difference, of the largest value."""
    difference = float((torch.as_tensor(found) - expected).abs().max() / expected.abs().max())
    assert difference < 1e-4, difference
    return f"{difference:.0e} off"


def onnx(model: nn.Module, expected: Tensor) -> str:
    import onnx
    import onnxruntime
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path, fused = str(Path(folder) / "model.onnx"), str(Path(folder) / "fused.onnx")
        batch = torch.export.Dim("batch", min=1)
        torch.onnx.export(model, (X,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = fused
        session = onnxruntime.InferenceSession(path, options)
        (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
        written, run = (len(onnx.load(file, load_external_data=False).graph.node) for file in (path, fused))
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for each in (found, compiled([X.numpy()])[0]):
            off(each, expected)
        return f"{written} nodes; ONNX Runtime runs {run}, OpenVINO {len(compiled.get_runtime_model().get_ops())}"


def executorch(model: nn.Module, expected: Tensor) -> str:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(torch.export.export(model, (X,)), partitioner=[XnnpackPartitioner()])
    calls = [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    pieces = sum("executorch_call_delegate" in call for call in calls)
    return f"{pieces} delegated, {sum('getitem' not in call for call in calls) - pieces} operators left"


def core_ml(model: nn.Module, expected: Tensor) -> str:
    import coremltools

    program = coremltools.convert(torch.export.export(model, (X,)).run_decompositions({}))
    (block,) = program.get_spec().mlProgram.functions["main"].block_specializations.values()
    return f"{sum(operation.type != 'const' for operation in block.operations)} operations"


def torchscript(model: nn.Module, expected: Tensor) -> str:
    return f"scripted, {off(torch.jit.script(model)(X), expected)}"


def xnnpack_int8(model: nn.Module, expected: Tensor) -> str:
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    return pt2e(model, expected, XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True)))


def x86_int8(model: nn.Module, expected: Tensor) -> str:
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    return pt2e(model, expected, X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()))


def pt2e(model: nn.Module, expected: Tensor, quantizer: Any) -> str:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(torch.export.export(model, (X,)).module(), quantizer)
    prepared(X)
    converted = convert_pt2e(prepared)
    convs = [node for node in converted.graph.nodes if "conv2d" in str(node.target)]
    quantized = sum("dequantize" in str(conv.args[0].target) for conv in convs)
    return f"{quantized} of {len(convs)} convs, {noise(converted(X), expected)}"


def fx_int8(model: nn.Module, expected: Tensor) -> str:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (X,))
    prepared(X)
    converted = convert_fx(prepared)
    quantized = sum(
        "quantized" in type(module).__module__ and "conv" in str(type(module)).lower() for module in converted.modules()
    )
    return f"{quantized} convs, {noise(converted(X), expected)}"


def noise(found: Tensor, expected: Tensor) -> str:
    return f"{10 * float(torch.log10(expected.square().sum() / (found - expected).square().sum())):.1f} dB"


ENGINES: dict[str, Callable[[nn.Module, Tensor], str]] = {
    "ONNX": onnx,
    "ExecuTorch, XNNPACK": executorch,
    "Core ML": core_ml,
    "TorchScript": torchscript,
    "PT2E int8, XNNPACK's quantizer": xnnpack_int8,
    "PT2E int8, Inductor's quantizer for x86": x86_int8,
    "prepare_fx, convert_fx": fx_int8,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="of timm, or torchvision/ and a name of torchvision's")
    warnings.simplefilter("ignore")
    for name in parser.parse_args().models:
        torch.manual_seed(0)
        create = torchvision.models.get_model if name.startswith("torchvision/") else timm.create_model
        model = settled(create(name.removeprefix("torchvision/")))
        versions = [model, *(se_fx.optimize_for_inference(model, target=target) for target in (None, "export"))]
        rows = []
        for engine, ask in ENGINES.items():
            row = [engine]
            for version in versions:
                try:
                    row.append(ask(version, model(X)))
                except Exception as error:  # whatever an engine raises on what it doesn't know
                    row.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60]}")
            rows.append(row)
        print(tabulate(rows, [name, "as it is", "optimised", 'target="export"'], tablefmt="github"))


if __name__ == "__main__":
    main()
