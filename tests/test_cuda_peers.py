"""FAESM's and ESME's algorithms (bench/cuda_peers.py) compute ESM-2, with the formula in place of the flash kernel."""

import benches  # noqa: F401  # for what comes from bench/
import pytest
import torch
from cuda_peers import ESME, FAESM, by_reference, padded

from plm.models.esm import ESM, MASK, Config, initialise
from plm.packing import Packed

LENGTHS = (9, 1, 33, 2)


@pytest.fixture
def net() -> ESM:
    """Four heads of 16, every weight at work."""
    net = ESM(Config(3, 64, 4, 128, None, False, True, 1e-5, lm_head=False)).requires_grad_(False).eval()
    initialise(net, torch.Generator().manual_seed(0))
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return net.double()


@pytest.fixture
def rows() -> list[torch.Tensor]:
    """Residues, some of them masked."""
    rows = [torch.randint(4, 24, (length,)) for length in LENGTHS]
    rows[0][3] = rows[2][[5, 30]] = MASK
    return rows


def peers(net: ESM, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    batch = Packed.from_ids(rows)
    ids, mask = padded(rows)
    with torch.inference_mode():
        return {
            "FAESM": FAESM(net, by_reference)(ids, mask)[mask],
            "ESME": ESME(net, by_reference)(batch.tokens, batch.offsets, batch.max_length),
            "plm": net.encode(batch).hidden,
        }


def test_all_give_the_same(net: ESM, rows: list[torch.Tensor]) -> None:
    found = peers(net, rows)
    for name in ("FAESM", "ESME"):
        # Both take the share of masked tokens in float32, ESME its cosines as well: 7e-8 was measured.
        assert (found[name] - found["plm"]).abs().max() < 5e-7, name


def test_pads_of_faesm_are_zero(net: ESM, rows: list[torch.Tensor]) -> None:
    ids, mask = padded(rows)
    assert not FAESM(net, by_reference)(ids, mask)[~mask].any()


@pytest.mark.parametrize("name", ["FAESM", "ESME"])
def test_the_comparison_can_fail(
    name: str, net: ESM, rows: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotary that is left out, for one, changes the numbers by far more than the bounds."""
    wanted = peers(net, rows)["plm"]
    monkeypatch.setattr(ESME, "turn", staticmethod(lambda x, cos, sin, offsets: x))
    monkeypatch.setattr("cuda_peers.turned_in_place", lambda qk, turns: None)
    assert (peers(net, rows)[name] - wanted).abs().max() > 1e-2
