"""Optimised models in the hands of others: quantizers, engines, compilers, fusers. Each that is installed: `.[exporters]`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from pages import code_of
from torch import Tensor, fx, nn
from trained import resnet10, settled

import se_fx

pytestmark = pytest.mark.integration

TARGETS = (None, "export")
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ONE_EACH = (1, 1, 1, 1)  # units in the stages of a ResNet


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "resnet10 with blocks":
        return se_fx.transform(settled(resnet10()), placement="residual", min_channels=1).eval()
    if name == "torchvision:resnet10":
        return settled(resnet10())
    library, _, name = name.rpartition(":")
    if library:
        return settled(torchvision.models.get_model(name))
    return settled(timm.create_model(name, **{"layers": ONE_EACH} if "resnet" in name else {}))


def noise(found: Tensor, expected: Tensor) -> float:
    """Signal to noise, in decibel."""
    return float(10 * torch.log10(expected.square().sum() / (found - expected).square().sum()))


def assert_near(found: Any, expected: Tensor) -> None:
    difference = (torch.as_tensor(found) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


# ------------------------------------------------------------------------------------------------------------------- int8
def pt2e(model: nn.Module, quantizer: Any) -> tuple[int, float]:
    """How many convolutions are quantized, and how well the result agrees."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_pt2e(torch.export.export(model, (X,)).module(), quantizer)
        prepared(X)
        converted = convert_pt2e(prepared)
        found = noise(converted(X), model(X))
    convs = [node for node in converted.graph.nodes if "conv2d" in str(node.target)]
    return sum("dequantize" in str(conv.args[0].target) for conv in convs), found


def test_the_page_on_quantizing() -> None:
    """Its code as it stands; the result is near the model, as far as eight bits go."""
    pytest.importorskip("torchao")
    names: dict[str, Any] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code_of("quantize.md", {}), names)
        assert noise(names["quantized"](names["x"]), names["model"](names["x"])) > 15  # dB


def x86() -> Any:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as kind

    return kind.X86InductorQuantizer().set_global(kind.get_default_x86_inductor_quantization_config())


def xnnpack() -> Any:
    from torchao.testing.pt2e import _xnnpack_quantizer as kind

    return kind.XNNPACKQuantizer().set_global(kind.get_symmetric_quantization_config(is_per_channel=True))


@pytest.mark.parametrize(
    ("name", "quantizer"), [("torchvision:resnet10", xnnpack), ("seresnet18", xnnpack), ("seresnet18", x86)]
)
def test_pt2e_quantizes_as_many_convs(name: str, quantizer: Callable[[], Any]) -> None:
    pytest.importorskip("torchao")
    model = network(name)
    count, expected = pt2e(model, quantizer())
    fast_count, found = pt2e(se_fx.optimize_for_inference(model, target="export"), quantizer())
    assert fast_count == count > 0
    assert found >= expected - 2
    # Without the target, gates' convolutions are products of vectors; all others are quantized.
    convs = sum(isinstance(module, nn.Conv2d) and ".se." not in name for name, module in model.named_modules())
    count, found = pt2e(se_fx.optimize_for_inference(model), quantizer())
    assert count == convs
    assert found >= expected - 2


def test_fx_quantizes_as_many_convs() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    found = []
    model = network("seresnet18")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for each in (model, se_fx.optimize_for_inference(model, target="export")):
            prepared = prepare_fx(each, get_default_qconfig_mapping("x86"), (X,))
            prepared(X)
            converted = convert_fx(prepared)
            kinds = [type(part) for part in converted.modules()]
            convs = sum("quantized" in kind.__module__ and kind.__name__.startswith("Conv") for kind in kinds)
            found.append((convs, noise(converted(X), model(X))))
    assert found[1][0] == found[0][0] > 0
    assert found[1][1] >= found[0][1] - 2


# ---------------------------------------------------------------------------------------------------- graphs of the others
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["seresnet18", "test_efficientnet", "resnet10 with blocks"])
def test_what_traces_and_fuses_finds_nothing_to_do(name: str, target: str | None) -> None:
    from torch.ao.quantization.quantize_fx import fuse_fx
    from torch.fx.experimental.optimization import fuse
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = network(name)
    fast = se_fx.optimize_for_inference(model, target=target)
    with torch.no_grad():
        expected = fast(X)
        assert_near(expected, model(X))
        for tool in (fx.symbolic_trace, fuse, fuse_fx):
            again = tool(fast)
            assert_near(again(X), expected)
            assert not any(isinstance(part, nn.BatchNorm2d) for part in again.modules())
            convs = [sum(isinstance(part, nn.Conv2d) for part in each.modules()) for each in (again, fast)]
            assert convs[0] == convs[1]
        last = get_graph_node_names(fast)[1][-1]
        assert torch.equal(create_feature_extractor(fast, [last])(X)[last], expected)


SCRIPTED = ["seresnet18", "test_efficientnet", "regnety_002", "resnest14d", "ecaresnet26t", "torchvision:efficientnet_b0"]


@pytest.mark.parametrize("name", [*SCRIPTED, "torchvision:regnet_y_400mf", "resnet10 with blocks"])
def test_torchscript(name: str) -> None:
    model = network(name)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(se_fx.optimize_for_inference(model, target="export"))
        frozen = torch.jit.freeze(scripted)
        for x in (X, X[:1, :, :24]):
            assert_near(scripted(x), model(x))
            assert_near(frozen(x), model(x))


# ---------------------------------------------------------------------------------------------------------------- engines
@pytest.mark.parametrize("name", ["seresnet18", "test_efficientnet", "resnet10 with blocks"])
def test_onnxruntime_and_openvino_run_no_more_nodes(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, counts = network(name), []
    for number, each in enumerate((model, se_fx.optimize_for_inference(model, target="export"))):
        path, fused = str(tmp_path / f"{number}.onnx"), str(tmp_path / f"{number}-fused.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shapes = ({0: torch.export.Dim("batch", min=1)},)
            torch.onnx.export(each, (X,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        options = runtime.SessionOptions()
        options.optimized_model_filepath = fused
        session = runtime.InferenceSession(path, options)
        import onnx

        sizes = [len(onnx.load(file, load_external_data=False).graph.node) for file in (path, fused)]
        with torch.no_grad():
            expected = model(X)
        assert_near(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0], expected)
        try:
            import openvino
        except ImportError:
            openvino = None
        if openvino is not None:
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            assert_near(compiled([X.numpy()])[0], expected)
            sizes.append(len(compiled.get_runtime_model().get_ops()))
        counts.append(sizes)
    assert all(after <= before for before, after in zip(*counts, strict=True)), counts


def test_executorch_delegates_no_more_pieces() -> None:
    pytest.importorskip("executorch.exir")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    model, pieces = network("seresnet18"), []
    for each in (model, se_fx.optimize_for_inference(model, target="export")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            edge = to_edge_transform_and_lower(torch.export.export(each, (X,)), partitioner=[XnnpackPartitioner()])
        nodes = [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]
        delegated = sum("executorch_call_delegate" in name for name in nodes)
        pieces.append((delegated, sum("getitem" not in name for name in nodes) - delegated))
    assert pieces[1][0] <= pieces[0][0]
    assert pieces[1][1] <= pieces[0][1]


def test_core_ml_converts() -> None:
    tools = pytest.importorskip("coremltools")
    model, counts = network("seresnet18"), []
    for each in (model, se_fx.optimize_for_inference(model, target="export"), se_fx.optimize_for_inference(model)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = tools.convert(torch.export.export(each, (X,)).run_decompositions({}))
        (block,) = program.get_spec().mlProgram.functions["main"].block_specializations.values()
        counts.append(sum(operation.type != "const" for operation in block.operations))
    assert counts[1] <= counts[0]
