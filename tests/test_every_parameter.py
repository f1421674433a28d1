"""Every parameter of every public function, method and constructor has a row of bad input."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator

from bad_values import CALLS
from test_bad_input import CHOOSING, ROWS

import se_fx
from se_fx.criteria import CRITERIA
from se_fx.planning import Options

#: Made by functions, not by hand: their constructors check nothing.
RESULTS = {
    *("Benchmark", "Cost", "Folding", "GateProfile", "Machine", "Optimization", "Plan", "Report", "Site", "SiteGates"),
    *("SqueezeExciteError", "Suggestion"),
}
#: They run in graphs, where a check would be recorded.
TRACED = {"SqueezeExcite2d.excitation", "SqueezeExcite2d.forward"}


def public() -> Iterator[tuple[str, str]]:
    """Every parameter of every public function, method and constructor, and every option, whether signatures name it or not."""
    options = {*CRITERIA, *(field.name for field in dataclasses.fields(Options))} - {"criteria"}
    yield from ((name, option) for name in CHOOSING for option in options)
    for name in se_fx.__all__:
        found = getattr(se_fx, name)
        functions = {name: found}
        if inspect.isclass(found):
            methods = {method: getattr(found, method) for method in vars(found) if not method.startswith("_")}
            functions = {f"{name}.{method}": value for method, value in methods.items() if callable(value)}
            functions |= {} if name in RESULTS else {name: found}
        for path, function in functions.items():
            for parameter in inspect.signature(function).parameters.values():
                if parameter.name != "self" and parameter.kind is not parameter.VAR_KEYWORD and path not in TRACED:
                    yield path, parameter.name


def test_no_parameter_is_without_a_row() -> None:
    assert set(public()) <= {(name, argument) for name, argument, _, _ in ROWS}
    assert {name for name, *_ in ROWS} == set(CALLS)
