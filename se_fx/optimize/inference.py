"""Optimisation for inference: a model's eval graphs, rewritten so that Squeeze-and-Excitation costs little."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from se_fx.analysis import WithoutValues, arguments, called, is_plain, modules_of
from se_fx.arguments import chosen_names
from se_fx.capture import Capture, capture, collector_paused
from se_fx.cost import NEEDS_VALUES, Call, as_call, faked, measure
from se_fx.errors import SqueezeExciteError, shown
from se_fx.planning import take_plans
from se_fx.regions import EXCITE, GraphRegion, add_constants, clone, copied, own_class, restore_code, run_graphs, view
from se_fx.rewrites import REWRITES, Algebra, Change, Optimization, Rewrite, Step, give_optimization, optimization_of

__all__ = ["apply_rewrite", "note_size", "optimize_for_inference", "without_autocast"]


def optimize_for_inference(
    model: nn.Module, example_inputs: Any = None, *, rewrites: Iterable[str] | None = None, target: str | None = None
) -> nn.Module:
    """A copy of `model` for inference, in which Squeeze-and-Excitation costs little. The model itself is left as it is.

    Works on se_fx's blocks and on those of others, recognised by what they compute: an average over space, a few layers, a
    product with the feature map. All else runs as before. The copy shares the tensors that no rewrite changes, is in
    eval mode for good, and has weights as they are at the time of this call. Outputs are those of the model up to rounding:
    ``torch.allclose(rtol=1e-3, atol=1e-5)`` in float32; in bfloat16 weights are rounded once more, by 2^-9 of their value.

    The rewrites, in their order (`se_fx.rewrites.REWRITES`):

    - ``constant_gates``: gates that are the same for every input become factors, or vanish;
    - ``fold_norms``: norms with fixed statistics go into the convolutions before them; behind a block, into its gate;
    - ``hoist_squeezes``: gates are computed from the input of the pointwise convolution before them, where that is narrower;
    - ``vector_products``: gates' layers become products of vectors and matrices, written out for small batches when compiled;
    - ``fuse_scales``: feature maps are scaled and added in one operator, or scaled in place.

    ``print(se_fx.report(optimized))`` tells what was done where, and why not elsewhere.

    Args:
        model: any module in eval mode, not yet compiled, scripted or wrapped.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With them, the report counts what is
            saved, and squeezes are hoisted where only the size of images tells whether that pays. Nothing is computed on them.
        rewrites: names of the rewrites to apply; None for all that the target has a use for.
        target: what the result is for: None for PyTorch, eager or compiled; ``"export"`` for engines with fusions of their own
            (ONNX Runtime, OpenVINO, Core ML, ExecuTorch, int8): the first three rewrites, in PyTorch's plain layers.

    Raises:
        SqueezeExciteError: the model is in training mode, or an argument is not what is expected.

    >>> from se_fx import SqueezeExcite2d, report
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 32, 1), nn.BatchNorm2d(32), SqueezeExcite2d(32)).eval()
    >>> for step in report(optimize_for_inference(net)).steps:
    ...     for change in step.changes:
    ...         print(f"{change.place}: {change.detail}")
    2: into 1
    1_folded: averages 8 channels instead of 32
    3.fc1_product: 8 to 4
    3.fc2: 4 to 32
    1_folded: in place
    """
    chosen = _chosen(rewrites, target)
    if isinstance(model, nn.Module) and model.training:
        raise SqueezeExciteError("model is in training mode: call model.eval() first; an optimised model can't be trained")
    if example_inputs is not None:
        as_call(example_inputs)
    if isinstance(model, nn.Module) and optimization_of(model) is not None:
        return clone(model)
    # Tensors made under inference_mode can't be used outside it, and autocast rounds.
    with torch.inference_mode(False), collector_paused(), without_autocast():
        captured = capture(model, finely=True)
        return _optimized(captured, chosen, example_inputs, exported=target == "export")


def _chosen(rewrites: Iterable[str] | None, target: str | None) -> dict[str, Rewrite]:
    given = chosen_names("rewrites", rewrites, REWRITES)
    if target not in (None, *_LEFT_OUT):
        raise SqueezeExciteError(f"target={shown(target)}: expected None or one of {list(_LEFT_OUT)}")
    left_out = _LEFT_OUT.get(target or "", ())
    names = [name for name in given if name not in left_out] if rewrites is None else given
    return {name: REWRITES[name] for name in names}


#: The rewrites that a target has no use for.
_LEFT_OUT = {"export": ("vector_products", "fuse_scales")}


def _optimized(captured: Capture, rewrites: dict[str, Rewrite], example_inputs: Any, exported: bool) -> nn.Module:
    base = clone(captured.model)
    take_plans(base)
    views: dict[str, fx.GraphModule] = {}
    alone = {base.get_submodule(region.path) for region in captured.regions if region.graphs is None}
    for region in captured.regions:
        if region.graphs is not None:
            module = base.get_submodule(region.path)
            restore_code(module, hosts=not region.path)
            add_constants(module, region.constants)
            views[region.path] = view(module, copied(region.graphs[False])[0])
            _strip(views[region.path], alone)
    cost = None
    if example_inputs is not None:
        cost = measure(captured.model, example_inputs).total
        if "" in views:
            _note_sizes(views[""], as_call(example_inputs))
    algebras = {path: Algebra(region, exported=exported) for path, region in views.items()}
    before, steps = cost, []
    for name, rewrite in rewrites.items():
        changes = [change for path, algebra in algebras.items() for change in apply_rewrite(rewrite, algebra, path)]
        saved = None
        if cost is not None:
            is_changed = any(change.applied for change in changes)
            after = measure(_assembled(base, views, exported=exported), example_inputs).total if is_changed else cost
            saved, cost = cost - after, after
        steps.append(Step(name, tuple(changes), saved))
    optimized = _assembled(base, views, exported=exported)
    opaque = tuple(captured.opaque.items())
    give_optimization(optimized, Optimization(own_class(captured.model).__name__, tuple(steps), before, opaque))
    return optimized


def apply_rewrite(rewrite: Rewrite, algebra: Algebra, path: str = "") -> list[Change]:
    """Apply one rewrite to one region, in place; places are named as in the model."""
    changes = [change.within(path) for change in rewrite(algebra)]
    algebra.graph.lint()
    return changes


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Within, no device casts."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


# ------------------------------------------------------------------------------------------------------------ preparation
def _strip(region: fx.GraphModule, alone: set[nn.Module]) -> None:
    """Take out what does nothing in eval mode, and have modules not scale what they return where blocks are nodes.

    Args:
        region: the region.
        alone: convs that code calls which isn't in graphs, and that go on scaling there.
    """
    modules = modules_of(region)
    for node in list(region.graph.nodes):
        module, given = called(node, modules), arguments(node, modules) or {}
        if _is_idle(module) and len(node.args) + len(node.kwargs) == 1 and isinstance(given.get("input"), fx.Node):
            node.replace_all_uses_with(given["input"])
            region.graph.erase_node(node)
        elif module is not None and EXCITE in node.kwargs and module not in alone:
            restore_code(module)
            node.kwargs = {}


def _is_idle(module: nn.Module | None) -> bool:
    """Whether a module returns what it is given."""
    return module is not None and is_plain(module) and type(module).forward in _IDLE_FORWARDS and not module.training


_IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_IDLE_FORWARDS = tuple(kind.forward for kind in _IDLE)


class _Sizes(WithoutValues):
    """Notes the batch, height and width of every feature map at its node."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        note_size(n, result)
        return result


def note_size(node: fx.Node, value: Any) -> None:
    """Note a feature map's batch, height and width at its node; of sizes that may change, what they are at first."""
    if isinstance(value, Tensor) and value.ndim == 4:
        sizes = value.shape[0], *value.shape[2:]
        node.meta["size"] = tuple(size if isinstance(size, int) else int(size.node.hint or 0) for size in sizes)


def _note_sizes(region: fx.GraphModule, call: Call) -> None:
    """Run the model's own region on fake tensors, as far as that is possible without values."""
    with contextlib.suppress(*NEEDS_VALUES), faked(region, call) as (fake, inputs):
        args, kwargs = inputs
        names = [str(node.target) for node in region.graph.nodes if node.op == "placeholder"]
        values = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
        with torch.no_grad():
            _Sizes(fake).run(*values)  # a clone runs the graph of its original: notes are left there


# --------------------------------------------------------------------------------------------------------------- assembly
def _assembled(base: nn.Module, views: Mapping[str, fx.GraphModule], *, exported: bool) -> nn.Module:
    """A copy of `base` whose regions run the graphs of `views` in eval mode, and refuse to run in training."""
    model = clone(base)
    for path, region in views.items():
        module = model.get_submodule(path)
        graph, _ = copied(region.graph)
        for node in graph.nodes:
            _bring(module, region, node)
        run_graphs(module, {False: graph, True: _refusal(graph)}, as_graph_module=not path, keeps_class=False)
        if isinstance(module, GraphRegion) and not isinstance(module, own_class(module)):
            _prune(module)
            if exported:
                _bare(module)
    return model


def _bring(module: nn.Module, region: fx.GraphModule, node: fx.Node) -> None:
    """Give `module` what a node of a rewritten graph refers to, if it hasn't got it."""
    path, _, name = str(node.target).rpartition(".")
    if node.op == "call_module" and name not in module.get_submodule(path)._modules:
        module.get_submodule(path).add_module(name, region.get_submodule(str(node.target)))
    elif node.op == "get_attr" and not path and not hasattr(module, name):
        module.register_buffer(name, region.get_buffer(name))


def _prune(root: GraphRegion) -> None:
    """Take out the modules and tensors that the eval graph doesn't use, whatever names they have."""
    used = _used(root)
    paths = [str(node.target).rpartition(".") for node in root.graph.nodes if node.op == "get_attr"]
    read = {(root.get_submodule(path), name) for path, _, name in paths}
    for module in list(root.modules())[::-1]:  # children before parents
        if module not in used:
            for name in [*module._parameters, *module._buffers]:
                if (module, name) not in read:
                    setattr(module, name, None)  # what prints the module still looks for it
            for name, child in [*module.named_children()]:
                if child not in used and not [*child.children(), *child.parameters(), *child.buffers()]:
                    delattr(module, name)
                    if type(module).__repr__ is not nn.Module.__repr__:  # it may look for it
                        setattr(module, name, nn.Identity())


def _used(root: GraphRegion) -> set[nn.Module]:
    """The modules that the eval graph calls, and those within them."""
    calls = [root.get_submodule(str(node.target)) for node in root.graph.nodes if node.op == "call_module"]
    return {part for module in calls for part in module.modules()}


def _bare(root: GraphRegion) -> None:
    """Take the code of modules that the graph enters and doesn't call, so that nobody compiles it."""
    used = _used(root)
    for path, module in list(root.named_modules())[::-1]:
        if path and module not in used:
            bare = nn.Module()
            for name in ("_modules", "_parameters", "_buffers", "training"):
                bare.__dict__[name] = module.__dict__[name]
            outer, _, name = path.rpartition(".")
            root.get_submodule(outer)._modules[name] = bare


def _refusal(graph: fx.Graph) -> fx.Graph:
    """The same graph, of which the first step raises: tools that look into both modes find the same nodes in them."""
    refusal, _ = copied(graph)
    inputs = [node for node in refusal.nodes if node.op == "placeholder"]
    with refusal.inserting_before(next(node for node in refusal.nodes if node.op != "placeholder")):
        call = refusal.call_function(refuse_training, tuple(inputs))
        call.meta["is_wrapped"] = True  # so that loading a pickle, which traces the code again, doesn't run it
        for position, node in enumerate(inputs):
            checked = refusal.call_function(operator.getitem, (call, position))
            node.replace_all_uses_with(checked, delete_user_cb=lambda user: user not in (call, checked))  # noqa: B023
    return refusal


def refuse_training(*inputs: Any) -> NoReturn:
    """What an optimised model runs in training mode.

    Raises:
        SqueezeExciteError: always.
    """
    raise SqueezeExciteError(
        "this model was optimised for inference, and can't be trained: call .eval(), or train the model it was made from"
    )
