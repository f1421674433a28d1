"""Progress bars on stderr, where tqdm is installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from se_fx.arguments import check_flag

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(label: str, unit: str, total: int | None, shown: bool) -> Iterator[Callable[[], object]]:
    """Within, a bar; call what it yields at each step. Nothing is shown without tqdm.

    Raises:
        SqueezeExciteError: `shown`, the caller's argument `progress`, is neither True nor False.
    """
    check_flag("progress", shown)
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
    else:
        with tqdm(total=total, desc=label, unit=unit, leave=False, file=sys.stderr, disable=not shown) as bar:
            yield bar.update
