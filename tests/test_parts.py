"""Attention in parts against attention to all keys at once, whichever kernel makes the parts."""

import math
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from plm_kernels import attention_part, merge_parts, padded_keys, parts, reference
from plm_kernels.parts import Part

# Two float64 programs that add in another order: 2e-15 is seen on values of about 1.
FLOAT64 = 1e-14
SCALE = 0.4
SHAPES = [(1, 1, 1, 1, 8), (3, 2, 1, 7, 5), (2, 4, 4, 130, 16), (1, 3, 9, 64, 6)]  # [b, h, m, t, d]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=["fused", "formula", "with gradients"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way in which a part can come about."""
    if request.param == "fused" and not parts.fused_available():
        pytest.skip("this torch has no fused attention that tells its sums")
    if request.param == "formula":
        monkeypatch.setattr(parts, "fused_available", lambda: False)
    with nullcontext() if request.param == "with gradients" else torch.inference_mode():
        yield request.param


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; the queries large enough that some keys have nearly all the weight."""
    b, h, m, t, d = shape
    return (
        4 * torch.randn(b, h, m, d, dtype=dtype),
        torch.randn(b, h, t, d, dtype=dtype),
        torch.randn(b, h, t, d, dtype=dtype),
    )


def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Part:
    """Written out: exponentials, their sum, and the mean that they weigh."""
    logits = SCALE * torch.einsum("bhmd,bhtd->bhmt", q, k) + (0 if mask is None else mask)
    weights = logits.exp()
    return torch.einsum("bhmt,bhtd->bhmd", weights, v) / weights.sum(-1, keepdim=True), weights.sum(-1).log()


def same(found: Part, wanted: Part) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=FLOAT64 * max(1, theirs.abs().max().item()))


def in_parts(q: Tensor, k: Tensor, v: Tensor, cut: int, mask: Tensor | None = None) -> Tensor:
    """Attention to the keys before ``cut`` and to those from it on."""
    masks = (None, None) if mask is None else (mask[..., :cut], mask[..., cut:])
    first = attention_part(q, k[:, :, :cut], v[:, :, :cut], scale=SCALE, mask=masks[0])
    second = attention_part(q, k[:, :, cut:], v[:, :, cut:], scale=SCALE, mask=masks[1])
    return merge_parts(first, second)


@every_shape
def test_a_part_of_all_keys_is_the_whole(kernel: str, shape: tuple[int, ...]) -> None:
    q, k, v = random(shape)
    same(attention_part(q, k, v, scale=SCALE), whole(q, k, v))


def test_parts_merge_to_the_whole(kernel: str) -> None:
    """Wherever the keys are cut, in whatever order, and of three parts as of two."""
    q, k, v = random((2, 3, 4, 20, 6))
    wanted, _ = whole(q, k, v)
    for cut in (1, 7, 10, 19):
        torch.testing.assert_close(in_parts(q, k, v, cut), wanted, rtol=0, atol=FLOAT64)
        order = torch.randperm(20)
        torch.testing.assert_close(in_parts(q, k[:, :, order], v[:, :, order], cut), wanted, rtol=0, atol=FLOAT64)
    one, two, three = (
        attention_part(q, k[:, :, here], v[:, :, here], scale=SCALE)
        for here in (slice(0, 3), slice(3, 12), slice(12, 20))
    )
    both = (merge_parts(one, two), torch.logaddexp(one[1], two[1]))
    torch.testing.assert_close(merge_parts(both, three), wanted, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("broadcast", [(2, 3, 4), (2, 1, 1), (1, 3, 1)], ids=str)
def test_masks(kernel: str, broadcast: tuple[int, ...]) -> None:
    """A bias of any shape that broadcasts, and ``-inf`` for keys that count for nothing."""
    q, k, v = random((2, 3, 4, 20, 6))
    bias = torch.randn(*broadcast, 20, dtype=torch.float64)
    hidden = bias.masked_fill(torch.arange(20) % 3 == 1, -torch.inf)
    for mask in (bias, hidden):
        same(attention_part(q, k, v, scale=SCALE, mask=mask), whole(q, k, v, mask))
        torch.testing.assert_close(in_parts(q, k, v, 8, mask), whole(q, k, v, mask)[0], rtol=0, atol=FLOAT64)
    seen = torch.arange(20) % 3 != 1
    same(
        attention_part(q, k, v, scale=SCALE, mask=hidden),
        whole(q, k[:, :, seen], v[:, :, seen], bias[..., seen]),
    )


def test_strided_keys_and_values(kernel: str) -> None:
    """As a cache gives them: a part of its slots and of its tokens, nothing copied."""
    stores = torch.randn(2, 5, 3, 40, 6, dtype=torch.float64)
    q = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    k, v = (store[1:3, :, :17] for store in stores)
    assert not k.is_contiguous()
    same(attention_part(q, k, v, scale=SCALE), whole(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_part_without_keys_changes_no_bit(dtype: torch.dtype) -> None:
    """Its sum is the logarithm of nothing, and what it gathers is not looked at."""
    precise = torch.promote_types(dtype, torch.float32)
    some = torch.randn(2, 3, 4, 6, dtype=dtype), torch.randn(2, 3, 4, dtype=precise)
    none = torch.zeros_like(some[0]), torch.full_like(some[1], -torch.inf)
    for merged in (merge_parts(none, some), merge_parts(some, none)):
        assert torch.equal(merged, some[0]) and merged.dtype == dtype


@pytest.mark.parametrize("difference", [-800.0, -90.0, 90.0, 800.0])
def test_a_part_of_no_weight(difference: float) -> None:
    """Sums so far apart that an exponential of their difference would overflow."""
    one, other = torch.randn(2, 1, 1, 1, 6)
    merged = merge_parts((one, torch.full((1, 1, 1), difference)), (other, torch.zeros(1, 1, 1)))
    torch.testing.assert_close(merged, one if difference > 0 else other, rtol=0, atol=0)


@every_shape
def test_float32_is_as_precise_as_the_formula(kernel: str, shape: tuple[int, ...]) -> None:
    b, h, m, t, d = shape
    q, k, v = random((8 * b, h, m, t + 1, d))
    truth, sums = whole(q, k, v)
    narrow = [x.float() for x in (q, k, v)]
    formula, formula_sums = reference.attention_part(*narrow, scale=SCALE)
    found, found_sums = attention_part(*narrow, scale=SCALE)
    # The noise floor is the formula's own error in float32; queries, keys and values are rounded for all alike.
    assert rms(found - truth) <= 2 * rms(formula - truth)
    assert rms(found_sums - sums) <= 2 * rms(formula_sums - sums)
    assert rms(in_parts(*narrow, cut=(t + 1) // 2) - truth) <= 2 * rms(formula - truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Parts keep their dtype and their sums are float32; to merge them was an error. As on CUDA: by the formula."""
    q, k, v = (x.to(dtype) for x in random((8, 3, 4, 20, 6)))
    truth, _ = whole(q.double(), k.double(), v.double())
    formula, sums = attention_part(q, k, v, scale=SCALE)
    assert (formula.dtype, sums.dtype) == (dtype, torch.float32)
    merged = in_parts(q, k, v, 9)
    assert merged.dtype == dtype
    # The noise floor is the formula's own error in half precision over all keys.
    assert rms(merged - truth) <= 2 * rms(formula - truth)


@pytest.mark.parametrize(("heads", "size"), [(16, 64), (16, 96), (32, 80), (4, 8), (5, 3)])
def test_no_bit_of_a_row_depends_on_how_many_there_are(heads: int, size: int) -> None:
    """A sigmoid's vectors used to leave over some of 16 heads, so that rows of an odd batch were rounded otherwise."""
    first, second = ((torch.randn(67, heads, size), 5 * torch.randn(67, heads)) for _ in range(2))
    with torch.inference_mode():
        wanted = merge_parts(first, second)
        for rows in (slice(0, 1), slice(1, 2), slice(0, 3), slice(5, 16), slice(50, 67), slice(0, 34)):
            parts_of = ((mixed[rows], sums[rows]) for mixed, sums in (first, second))
            assert torch.equal(merge_parts(*parts_of), wanted[rows])


def rms(x: Tensor) -> float:
    return math.sqrt(x.double().square().mean().item())


def test_gradients() -> None:
    """With them the formula is taken, for the fused kernel has none to its sums."""
    given = [x.requires_grad_() for x in random((2, 2, 3, 8, 4))]
    weights = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    found = torch.autograd.grad((in_parts(*given, cut=3) * weights).sum(), given)
    wanted = torch.autograd.grad((whole(*given)[0] * weights).sum(), given)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * FLOAT64)


OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"


def test_the_fused_kernel_is_looked_at_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is missing, takes other arguments or gives other sums is not used, and the formula is."""

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError

    def alone(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float) -> Tensor:
        return reference.attention_part(q, k, v, scale=scale, mask=attn_mask)[0]

    def turned(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float) -> Part:
        mixed, sums = reference.attention_part(q, k, v, scale=scale, mask=attn_mask)
        return mixed, sums.transpose(1, 2)

    def right(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float) -> Part:
        return reference.attention_part(q, k, v, scale=scale, mask=attn_mask)

    for operator, wanted in ((missing, False), (turned, False), (alone, False), (right, True)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.ops.aten, OPERATOR, operator)
            assert parts.fused_available.__wrapped__() is wanted


@pytest.mark.parametrize("size", [8, 64, 80, 96])
def test_a_single_query_has_the_same_bits_in_any_batch(size: int) -> None:
    """With as many keys as ``padded_keys`` says, masked ones behind them, whatever thread takes a row."""
    generator = torch.Generator().manual_seed(size)
    k, v = (torch.randn(13, 16, 160, size, generator=generator) for _ in range(2))
    q = torch.randn(13, 16, 1, size, generator=generator)
    with torch.inference_mode():
        for length in (1, 2, 7, 8, 15, 16, 17, 31, 64, 100, 144):
            count = padded_keys(length, size)
            assert 0 <= count - length < 16 and (count + 2 + size) % 16 == 0
            mask = torch.zeros(1, 1, 1, count).index_fill(3, torch.arange(length, count), -torch.inf)
            whole = attention_part(q, k[:, :, :count], v[:, :, :count], scale=0.3, mask=mask)
            plain = attention_part(q, k[:, :, :length], v[:, :, :length], scale=0.3)
            for found, wanted in zip(whole, plain, strict=True):
                torch.testing.assert_close(found, wanted)  # float32's own tolerance: padding has no weight
            for some in (slice(0, 1), slice(5, 7), slice(3, 13)):
                part = attention_part(q[some], k[some, :, :count], v[some, :, :count], scale=0.3, mask=mask)
                assert all(torch.equal(a, b[some]) for a, b in zip(part, whole, strict=True)), (length, some)
