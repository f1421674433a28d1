"""Rules: the FLOPs of operators that compute, but neither multiply matrices nor convolve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["FREE", "POINTWISE", "RULES", "written"]


def _read(args: Any, out: Any) -> int:
    return max(t.numel() for t in tree_leaves(args) if isinstance(t, Tensor))


def written(args: Any, out: Any) -> int:
    """The elements of an operator's largest result."""
    return max((t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)), default=0)


def _per_element(count: int) -> Callable[[Any, Any], int]:
    return lambda args, out: count * written(args, out)


def _window(args: Any, out: Any) -> int:
    """Pooling with a window: one operation for each element under each window. Windows are dispatched as lists."""
    height, width = (args[1] * 2)[:2]
    return written(args, out) * int(height) * int(width)


def _attention(args: Any, out: Any) -> int:
    """Two matrix products and a softmax, (N, heads, L, E) x (N, heads, S, E); PyTorch's counter has it for GPUs only."""
    query, key = args[:2]
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    return int(scores * (4 * query.shape[-1] + 5))


#: FLOPs of operators that compute, but neither multiply matrices nor work pointwise, from arguments and result.
RULES: dict[str, Callable[[Any, Any], int]] = {
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "argmax", "prod", "var", "std", "var_mean"), _read),
    **dict.fromkeys(("_adaptive_avg_pool2d", "adaptive_max_pool2d", "_adaptive_avg_pool3d", "cumsum", "norm"), _read),
    **dict.fromkeys(("linalg_vector_norm", "sort", "topk", "any", "all"), _read),
    **dict.fromkeys(("avg_pool2d", "max_pool2d_with_indices"), _window),
    # normalised by running statistics: one multiplication and one addition
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"), _per_element(2)),
    # statistics (2), normalisation (2), scale and shift (2)
    **dict.fromkeys(("native_layer_norm", "native_group_norm"), _per_element(6)),
    # maximum, difference, exponential, sum, quotient
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), _per_element(5)),
    # the sigmoid of one half, times the other
    "glu": _per_element(2),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "upsample_bilinear2d": _per_element(7),
    "upsample_bicubic2d": _per_element(39),
    "grid_sampler_2d": _per_element(7),
}
#: Pointwise operators that PyTorch does not tag as such.
POINTWISE = frozenset(
    """hardswish hardswish_ hardsigmoid_ hardtanh_ leaky_relu_ elu_ silu_ relu6 prelu mish_ log_sigmoid_forward""".split()  # noqa: SIM905
)
#: Operators that only move, make or describe data.
FREE = frozenset(
    """clone copy_ _to_copy contiguous cat stack roll repeat flip im2col constant_pad_nd reflection_pad2d replication_pad2d
    empty empty_like empty_strided new_empty new_zeros new_ones new_full zeros ones zeros_like ones_like full full_like
    arange linspace scalar_tensor lift_fresh lift_fresh_copy fill_ zero_ rand rand_like randn randn_like bernoulli_ tril triu
    index index_put index_put_ index_select gather scatter scatter_ embedding nonzero _local_scalar_dense
    upsample_nearest2d channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle
    device native_dropout resolve_conj resolve_neg is_same_size equal _unsafe_view""".split()  # noqa: SIM905
)
