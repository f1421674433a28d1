"""Peak memory of a call, on the CPU and on CUDA."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes of tensors that `step` has allocated at a time, beyond what was there before.

    On CUDA, what its caching allocator counts; on the CPU, by the profiler's events of allocations and releases, so that
    compiled code and the workspaces of libraries count too.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    live: dict[int, int] = {}
    now = peak = 0
    for _, pointer, size in sorted(_allocations(cast("Any", profiled.profiler).kineto_results.experimental_event_tree())):
        if size > 0:
            live[pointer] = size
        now += size if size > 0 else -live.pop(pointer, 0)  # what was there before the call counts neither way
        peak = max(peak, now)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Time, address and size of each allocation; the size is negative where memory is released."""
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Within, the profiler's backend, which reads this variable when it is first used, logs nothing to stderr."""
    level = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = level or "6"
    try:
        yield
    finally:
        del os.environ["KINETO_LOG_LEVEL"]
        os.environ |= {} if level is None else {"KINETO_LOG_LEVEL": level}
