"""``dtype="float32-bfloat16"``: what is rounded and what is not, what that costs in precision, and who takes it."""

import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from command_line import ESM2, FOLDS, Plm, save_tiny_proteinbert
from torch import Tensor, nn

import plm
from plm import layers
from plm.conversion import to_plm
from plm.layers import Linear, weights_unchanged
from plm.loading import open_checkpoint
from plm_kernels import ACTIVATIONS, Activation, Turns, rotary_half, rotary_pairs

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = ("esm/esm2_tiny", "esm/esm1b_tiny", "bert/igbert_tiny", "t5/ankh3_tiny", "progen2/bin_fp16_large_vocab")
PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQ", "MKV", "ACDEFGHIKLMNPQRSTVWYACDEFGHIKLMNPQRSTVWY", "M"]
BF16 = torch.finfo(torch.bfloat16).eps / 2  # the largest relative rounding
MIXED = "float32-bfloat16"


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Whether bfloat16 is fast here is no matter of these tests."""
    warnings.simplefilter("ignore", plm.loading.SpeedNotice)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(inputs: int = 40, outputs: int = 24, bias: bool = True) -> Linear:
    made = Linear(inputs, outputs, bias)
    with torch.no_grad():
        made.weight.copy_(numbers(outputs, inputs, seed=1) / inputs**0.5)
    made.multiply_in(torch.bfloat16)
    return made


def formula(x: Tensor, made: Linear, activation: Activation = "none") -> Tensor:
    """Rounded factors, and everything behind them in float64."""
    x, weight = (each.detach().to(torch.bfloat16).double() for each in (x, made.weight))
    bias = 0 if made.bias is None else made.bias.detach().double()
    return ACTIVATIONS[activation].formula(x @ weight.T + bias)


# ------------------------------------------------------------------------------------------------ a layer


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("rows", [0, 1, 3, 7, 65])
def test_a_layer_is_its_formula(
    rows: int, activation: Activation, bias: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rounding of the result, half a unit in its last place; unpacked, of the products and of the bias, too."""
    if not packed:
        monkeypatch.setattr(layers, "pack_rounded", lambda weight, dtype: None)
    made, x = layer(bias=bias), numbers(rows, 80)[:, ::2]  # not contiguous
    with torch.inference_mode():
        found = made(x, activation)
    wanted = formula(x, made, activation)
    assert found.dtype == torch.bfloat16 and made.weight.dtype == torch.float32 and found.shape == (rows, 24)
    scale = wanted.abs() + (0 if packed and activation == "none" else 1)  # small ones are small differences
    assert ((found - wanted).abs() <= (1 if packed else 3) * 1.01 * BF16 * scale + 1e-6).all()
    unrounded = ACTIVATIONS[activation].formula(nn.functional.linear(x, made.weight, made.bias))
    assert rows == 0 or not torch.equal(found, unrounded.bfloat16()), "nothing was rounded before it was multiplied"


def test_gradients_are_those_of_the_weight_in_float32() -> None:
    made, x = layer(), numbers(9, 40).requires_grad_()
    made(x).float().square().sum().backward()
    assert made.weight.grad is not None and x.grad is not None
    assert made.weight.grad.dtype == x.grad.dtype == torch.float32
    plain = Linear(40, 24)
    plain.load_state_dict(made.state_dict())
    plain(x).square().sum().backward()
    assert plain.weight.grad is not None
    # Two factors of three are rounded, sums of nine: far below 8 roundings of the largest.
    assert (made.weight.grad - plain.weight.grad).abs().max() <= 8 * BF16 * plain.weight.grad.abs().max()


def test_a_weight_is_rounded_once_and_again_when_it_changes() -> None:
    made, x = layer(), numbers(5, 40)
    with torch.inference_mode():
        first, kept = made(x), made.packed.packed
        assert torch.equal(made(x), first) and made.packed.packed is kept
    with torch.no_grad():
        made.weight.data.mul_(2)  # counts no version
        made.bias.mul_(2)
    with torch.inference_mode():
        assert torch.equal(made(x), 2 * first) and made.packed.packed is not kept
        with weights_unchanged():
            made(x)
            made.weight.data.mul_(2)
            assert torch.equal(made(x), 2 * first), "whoever says that nothing changes is believed"


def test_copies_and_pickles_round_as_well() -> None:
    made, x = layer(), numbers(5, 40)
    with torch.inference_mode():
        wanted = made(x)
    twins = (copy.deepcopy(made), pickle.loads(pickle.dumps(made)))
    with torch.inference_mode():
        assert all(torch.equal(twin(x), wanted) and twin.packed.packed is not None for twin in twins)


@pytest.mark.parametrize("rotary", [rotary_half, rotary_pairs])
def test_positions_turn_in_the_dtype_of_the_turns(rotary: object) -> None:
    """Queries in bfloat16 by angles in float32: rounded once, at the end."""
    assert callable(rotary)
    x = numbers(33, 3, 16).bfloat16()
    turns = Turns.at(torch.arange(33), 10_000 ** (-torch.arange(0, 16, 2) / 16), torch.float32)
    found = rotary(x, turns)
    assert found.dtype == torch.bfloat16 and torch.equal(found, rotary(x.float(), turns).bfloat16())


# ------------------------------------------------------------------------------------------------ a model


@pytest.mark.parametrize("folder", FOLDERS)
def test_parameters_stay_what_they_are(folder: str, tmp_path: Path) -> None:
    """All of them, to the bit, also behind a prediction, and from there into a file and back."""
    model, plain = plm.load(GOLDEN / folder, dtype=MIXED), plm.load(GOLDEN / folder, dtype="float32")
    plm.embed(model, PROTEINS)
    assert model.dtype == torch.float32 and model.products == torch.bfloat16 and model.precision == MIXED
    assert plain.products is None and plain.precision == "float32"
    to_plm(model.net.state_dict(), model.net.config, tmp_path / "again")
    want = open_checkpoint(tmp_path / "again").state(plain.net.state_dict())
    for name, tensor in plain.net.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(model.net.state_dict()[name], tensor), name
        assert torch.equal(want[name], tensor), name


@pytest.mark.parametrize("folder", FOLDERS)
def test_layers_of_the_blocks_alone(folder: str) -> None:
    model = plm.load(GOLDEN / folder, dtype=MIXED)
    linear = {name: x for name, x in model.net.named_modules() if isinstance(x, Linear)}
    narrow = {name for name, x in linear.items() if x.products == torch.bfloat16}
    assert narrow == {name for name in linear if "blocks." in name} and len(narrow) >= 4


@pytest.mark.parametrize("folder", FOLDERS)
def test_precision(folder: str) -> None:
    """Against float64, by the root of the mean square: at most 0.9 of what bfloat16 loses (measured: 0.55 to 0.8 on
    these small networks, 0.68 of twelve layers), and far more than float32 does (measured: 10,000 times)."""
    found = {
        dtype: torch.cat(plm.embed(plm.load(GOLDEN / folder, dtype=dtype), PROTEINS))
        for dtype in ("float64", "float32", MIXED, "bfloat16")
    }
    truth = found.pop("float64")
    lost = {dtype: float((x - truth).square().mean().sqrt()) for dtype, x in found.items()}
    assert 100 * lost["float32"] < lost[MIXED] <= 0.9 * lost["bfloat16"], lost


@pytest.mark.parametrize("folder", FOLDERS)
def test_alone_as_in_a_batch(folder: str) -> None:
    """Which kernel multiplies depends on the number of rows, so sums may round otherwise, and what they round to in
    bfloat16: by less than half of what the dtype loses itself."""
    model = plm.load(GOLDEN / folder, dtype=MIXED)
    together, alone = plm.embed(model, PROTEINS), [plm.embed(model, one)[0] for one in PROTEINS]
    truth = plm.embed(plm.load(GOLDEN / folder, dtype="float64"), PROTEINS)
    lost = (torch.cat(together) - torch.cat(truth)).square().mean().sqrt()
    assert (torch.cat(together) - torch.cat(alone)).square().mean().sqrt() <= 0.5 * lost
    assert all(x.dtype == torch.float32 for x in together)


def test_every_verb() -> None:
    """Contacts, scores and variants are no worse than in bfloat16 (measured: 1.18, 0.74 and 1.01 times its errors, the
    root of the mean square; 1.5 leaves room for the chance of few numbers). Texts are written again alike."""
    text = PROTEINS[0]
    changes = [f"{letter}{i + 1}W" for i, letter in enumerate(text)]
    found = []
    for dtype in ("float64", MIXED, "bfloat16"):
        model = plm.load(ESM2, dtype=dtype)
        contacts, (score,) = plm.contacts(model, text)[0], plm.score(model, text)
        found.append((contacts, score.per_residue, torch.tensor(plm.variants(model, text, changes))))
    for truth, mixed, coarse in zip(*found, strict=True):
        assert (mixed - truth).square().mean() <= 1.5**2 * (coarse - truth).square().mean()
    for folder in ("t5/ankh3_tiny", "progen2/bin_fp16_large_vocab"):
        model = plm.load(GOLDEN / folder, dtype=MIXED)
        one, other = (plm.generate(model, "MKT", max_length=12, seed=3, num_samples=2)[0] for _ in range(2))
        assert one == other and len(one[0].ids) > 1
        assert torch.isfinite(torch.tensor(plm.score(model, "MKTAYIAKQR")[0].total))


def test_what_is_held_of_each_weight() -> None:
    """The parameter and one rounded copy: six bytes for each number, not eight."""
    model = plm.load(ESM2, dtype=MIXED)
    plm.embed(model, PROTEINS)
    for name, module in model.net.named_modules():
        if isinstance(module, Linear) and module.products is not None:
            held = [x for x in vars(module.packed).values() if isinstance(x, Tensor)]
            assert module.packed.packed is not None and module.packed.packed.dtype == torch.bfloat16, name
            assert sum(x.numel() for x in held if x.dtype == torch.float32) <= 130, "a sample to tell changes by"


def test_it_verifies() -> None:
    report = plm.verify("plm-mini", dtype=MIXED)
    assert report.passed and report.dtype == MIXED
    assert all("torch.bfloat16" in finding.allowed for finding in report.findings)


# ------------------------------------------------------------------------------------------------ names


def test_both_names_are_one() -> None:
    one, other = (plm.load(ESM2, dtype=name) for name in (MIXED, "fp32-bf16"))
    assert one.precision == other.precision == MIXED
    assert torch.equal(plm.embed(one, PROTEINS[0])[0], plm.embed(other, PROTEINS[0])[0])


@pytest.mark.parametrize("name", ["bfloat16-float32", "float32-float16", "bf16-fp32", "float32_bfloat16"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"dtype '{name}' is unknown; choose 'auto', .*'float32-bfloat16'"):
        plm.load(ESM2, dtype=name)


def test_models_that_refuse_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype float32-bfloat16 cannot be used: an ESMFold .* bfloat16 or float32"):
        plm.load(FOLDS, dtype=MIXED)
    with pytest.raises(ValueError, match="a ProteinBERT spends its time on convolutions"):
        plm.load(save_tiny_proteinbert(tmp_path / "p"), dtype="fp32-bf16")


@pytest.mark.parametrize("dtype", [MIXED, "fp32-bf16", "int8", torch.int8])
def test_no_file_is_in_it(dtype: str | torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is how a model computes, and no file is in it; choose one of 'float32'"):
        plm.convert(ESM2, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_the_command_line(run: Plm, tmp_path: Path) -> None:
    """Either name is taken, and outputs have the long one."""
    code, out, err = run("embed", "MKTAYIAK", "-m", ESM2, "--pool", "mean", "--dtype", "fp32-bf16", "--format", "jsonl")
    assert code == 0 and "in float32-bfloat16 with" in err
    (wanted,) = plm.embed(plm.load(ESM2, dtype=MIXED), "MKTAYIAK", pool="mean")
    row = next(line for line in map(json.loads, out.splitlines()) if "embedding" in line)
    assert torch.equal(torch.tensor(row["embedding"]), wanted)
    code, _, err = run("fold", "MKTAYIAK", "-m", FOLDS, "-o", str(tmp_path / "out"), "--dtype", "float32-bfloat16")
    assert code == 2 and "mixes the two by itself" in err and "--dtype" in err
    assert run("convert", ESM2, str(tmp_path / "there"), "--dtype", "fp32-bf16").code == 2
    code, out, _ = run("verify", "plm-mini", "--dtype", "fp32-bf16", "--json")
    assert code == 0 and json.loads(out)["dtype"] == MIXED


def test_a_batch_holds_as_many_tokens_as_the_widest_tensor_lets_it() -> None:
    """Which is in bfloat16."""
    for dtype in (MIXED, "bfloat16"):
        model = plm.load(ESM2, dtype=dtype)
        wide = plm.Model(model.net, model.tokenizer, tiny.origin("esm"), "", model.products)
        assert plm.running.default_max_tokens(wide) == 4096


def test_elsewhere_a_weight_is_rounded_once_and_its_numbers_are_not_asked_for() -> None:
    """They would have to be waited for on a GPU. On ``meta`` there are none, so asking would fail."""
    made, x = layer().to("meta"), torch.empty(5, 40, device="meta")
    with torch.inference_mode():
        assert made(x).dtype == torch.bfloat16
        kept = made.packed.packed
        made(x)
        assert kept is not None and kept.dtype == torch.bfloat16 and made.packed.packed is kept
    with torch.no_grad():
        made.weight.mul_(2)  # counts a version
        made(x)
    assert made.packed.packed is not kept
