"""Attention to some of the keys at a time: softmax over all of them is a weighted mean of softmaxes over parts.

A decoder uses it to look at a prompt that many texts share and at each text's own tokens, which lie elsewhere.

Letters: b batch, h heads, m queries, t keys, d head size.
"""

from functools import cache

import torch
from torch import Tensor

from plm_kernels.reference import attention_part as formula

Part = tuple[Tensor, Tensor]
"""What queries gather from some keys ``[..., d]``, and the logarithm of the sum of their weights ``[...]``."""


def attention_part(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Part:
    """Attention of q ``[b, h, m, d]`` to k, v ``[b, h, t, d]``: the part ``[b, h, m, d]``, ``[b, h, m]``.

    ``mask`` is added to the scaled logits and broadcasts to ``[b, h, m, t]``.
    """
    if q.device.type != "cpu" or torch.is_grad_enabled() or not fused_available():
        return formula(q, k, v, scale=scale, mask=mask)
    mixed, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    return mixed, sums


def merge_parts(first: Part, second: Part) -> Tensor:
    """What the queries gather from the keys of both parts ``[..., d]``. One of the sums may be ``-inf``: no keys."""
    # A softmax over these two goes row by row. A sigmoid of their difference would go through all rows in vectors and
    # round what is left over otherwise, so that a row's bits would depend on how many there are.
    share = torch.stack((first[1], second[1]), -1).softmax(-1)[..., :1]  # in float32 at least, as the sums are
    return torch.lerp(second[0].to(share.dtype), first[0].to(share.dtype), share).to(first[0].dtype)


def padded_keys(count: int, head_size: int) -> int:
    """How many keys a single query should be given, ``count`` of them and masked ones, for bits that do not depend on
    the batch.

    torch's kernel gives each thread ``keys + 2 + head_size`` floats to work in, one thread's behind the other's, and
    the products in them are rounded by where they lie within a line of 16. With whole lines that is the same in all
    threads, so it does not matter which of them takes a row.
    """
    return count + -(count + 2 + head_size) % 16


@cache
def fused_available() -> bool:
    """Whether torch's fused attention on a CPU (a private operator) gives the sums as well, as it has since 2.2."""
    try:
        with torch.inference_mode():
            q, k = torch.eye(2, 16)[None, None], torch.eye(3, 16)[None, None]
            mask = torch.tensor([0.0, 1.0, -torch.inf]).view(1, 1, 1, 3)
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, attn_mask=mask, scale=1.0)
            wanted = formula(q, k, k, scale=1.0, mask=mask)
        return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError, ValueError):
        return False
