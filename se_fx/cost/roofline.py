"""A roofline: how long operators would take at a machine's peak rates of computing and of moving bytes. An estimate.

Source: Williams, Waterman, Patterson, *Roofline*, Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from se_fx.arguments import as_device, check_floating
from se_fx.cost.counting import Operator
from se_fx.errors import SqueezeExciteError

__all__ = ["Machine", "measure_machine"]


@dataclass(frozen=True)
class Machine:
    """The two peak rates of a device, for one dtype.

    Attributes:
        flops_per_second: of a large matrix product.
        bytes_per_second: of a large copy, reads and writes together.
        device: the device they were measured on.
        dtype: the dtype of the matrices.
    """

    flops_per_second: float
    bytes_per_second: float
    device: str
    dtype: str

    def seconds(self, operators: Iterable[Operator]) -> float:
        """What operators take at least, one after the other, each bound by arithmetic or by memory.

        An estimate for eager mode: nothing is fused or cached, and starting an operator takes no time.

        >>> Machine(100.0, 10.0, "cpu", "float32").seconds([Operator(200, 5, None), Operator(10, 30, None)])
        5.0
        """
        if not isinstance(operators, Iterable):
            raise SqueezeExciteError(f"operators={type(operators).__name__}: expected the operators of a report")
        return sum(max(each.flops / self.flops_per_second, each.bytes / self.bytes_per_second) for each in operators)


def measure_machine(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Measure a machine's peak rates: a 2048 x 2048 matrix product and a 128 MiB copy, the best of some runs of each.

    Takes about a second, and 300 MiB of the device's memory.

    Raises:
        SqueezeExciteError: this machine has no such device, or `dtype` is no floating-point dtype.
    """
    from torch.utils.benchmark import Timer  # takes time to import

    where = as_device(device)
    check_floating("dtype", dtype)
    size, count = 2048, 2**27
    matrix = torch.randn(size, size, device=where).to(dtype)
    source = torch.zeros(count, dtype=torch.uint8, device=where)
    target = torch.ones_like(source)
    threads = torch.get_num_threads()

    def best(statement: str, names: dict[str, torch.Tensor]) -> float:
        timer = Timer(statement, globals=names, num_threads=threads)
        timer.timeit(1)
        return min(timer.timeit(1).mean for _ in range(5))

    product = best("matrix @ matrix", {"matrix": matrix})
    copy = best("target.copy_(source)", {"target": target, "source": source})
    return Machine(2 * size**3 / product, 2 * count / copy, str(where), str(dtype).removeprefix("torch."))
