"""Rows, headers and published values of every checkpoint, proven without a download."""

import dataclasses
import hashlib
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plm.models.esm import ESM, Config
from plm_weights import esm, registry
from plm_weights.checks import Check, checks
from plm_weights.errors import UnknownModelError
from plm_weights.fetch import fetch
from plm_weights.keymap import Drop, KeyMap, check, export_weights
from plm_weights.read import open_tensors
from plm_weights.registry import CHECKPOINTS, Checkpoint, Form, find, header

WEIGHTS = Path(registry.__file__).parent
PUBLISHED = [row for row in CHECKPOINTS if row.header]
every_row = pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)


def config(row: Checkpoint) -> Config:
    assert row.config is not None
    return Config(**row.config)  # type: ignore[arg-type]


def size(header: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in header.values())


def safetensors_size(header: dict[str, Tensor]) -> int:
    """Bytes of the file that safetensors writes: a length, a JSON text filled up to a multiple of eight, the data."""
    codes = {torch.float32: "F32", torch.int64: "I64"}
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(header, key=lambda name: (-header[name].element_size(), name)):
        start, end = end, end + header[name].numel() * header[name].element_size()
        shape, dtype = [*header[name].shape], codes[header[name].dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return 8 + -(-len(json.dumps(entries, separators=(",", ":"))) // 8) * 8 + end


def test_every_checkpoint_of_the_family_has_a_row() -> None:
    assert [row.name for row in CHECKPOINTS] == [
        *("plm-mini", "esm2-8m", "esm2-35m", "esm2-150m", "esm2-650m", "esm2-3b", "esm2-15b"),
        *("esm1b", "esm1v-1", "esm1v-2", "esm1v-3", "esm1v-4", "esm1v-5"),
    ]


def test_plm_mini_ships_as_its_row_says() -> None:
    row = find("plm-mini")
    folder = fetch(row)
    for file in row.files:
        content = (folder / file.name).read_bytes()
        assert file.size in (None, len(content))
        assert not file.sha256 or hashlib.sha256(content).hexdigest() in file.sha256
    source = open_tensors(folder / "model.safetensors")
    trained = [name for name in source if not name.endswith("inv_freq")]
    assert sum(source.meta[name].numel() for name in trained) == row.parameters
    assert {str(source.meta[name].dtype) for name in trained} == {"torch.float16"}


def test_names_are_unique_and_rows_well_formed() -> None:
    """A name that two rows share would hide one; a hash or revision of a wrong form could never match."""
    names = [name.casefold() for row in CHECKPOINTS for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))
    for row in CHECKPOINTS:
        files = row.files + row.originals
        assert all(re.fullmatch("[0-9a-f]{64}", sha256) for file in files for sha256 in file.sha256), row.name
        assert len({file.name for file in files}) == len(files), row.name
        assert row.revision is None or re.fullmatch("[0-9a-f]{40}", row.revision), row.name
        assert all((row.licence, row.citation, row.hub or row.folder)), row.name
    hashes = [sha256 for row in CHECKPOINTS for file in row.originals for sha256 in file.sha256]
    assert len(hashes) == len(set(hashes)) == 12


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("facebook/esm2_t33_650M_UR50D", "esm2-650m"),
        ("ESM2_T33_650M_UR50D", "esm2-650m"),
        ("esm2_650m", "esm2-650m"),
        ("esm1v", "esm1v-1"),
        ("esm1v_t33_650M_UR90S", "esm1v-1"),
        ("esm1v-n3", "esm1v-3"),
        ("plm-mini", "plm-mini"),
    ],
)
def test_find_knows_the_names_in_use(name: str, expected: str) -> None:
    assert find(name).name == expected


def test_find_names_what_is_near() -> None:
    with pytest.raises(UnknownModelError, match=r"'esm2-65m': did you mean esm2-650m .*A hub id \(organisation/name\)"):
        find("esm2-65m")
    with pytest.raises(UnknownModelError, match=r"known are plm-mini, esm2-8m, .* a folder or a file works as well"):
        find("zzzz")


def test_originals_have_the_urls_of_their_publisher() -> None:
    models, regression = (file.url for file in find("esm2-8m").originals)
    assert models == "https://dl.fbaipublicfiles.com/fair-esm/models/esm2_t6_8M_UR50D.pt"
    assert regression == "https://dl.fbaipublicfiles.com/fair-esm/regression/esm2_t6_8M_UR50D-contact-regression.pt"
    assert [file.name for file in find("esm1v").originals] == ["esm1v_t33_650M_UR90S_1.pt"]


@every_row
def test_parameters_follow_from_the_configuration(row: Checkpoint) -> None:
    """By the formula, and by adding up the published tensors that are trained."""
    net, vocabulary = config(row), 33
    c, wide = net.channels, net.feed_forward
    block = 4 * (c * c + c) + (2 * c * wide + wide + c) + 2 * 2 * c
    language_head = c * c + c + 2 * c + vocabulary
    embedding = vocabulary * c + (net.learned_positions or 0) * c + 2 * c * net.norm_before
    assert row.parameters == embedding + net.layers * block + 2 * c + language_head
    counted_elsewhere = re.compile(r".*inv_freq|encoder\.lm_head\.weight|contact_head\..*")
    tensors = header(row.name, "original").items()
    assert row.parameters == sum(tensor.numel() for name, tensor in tensors if not counted_elsewhere.fullmatch(name))


@every_row
@pytest.mark.parametrize("form", ["hub", "original"])
def test_every_header_loads_into_the_model_and_comes_back(row: Checkpoint, form: Form) -> None:
    """The key map reads each published tensor once and fills each of ours once; back, only what it drops is missing."""
    net = config(row)
    rotary = net.learned_positions is None
    with torch.device("meta"):
        state = ESM(net).state_dict()
    published = header(row.name, form)
    rows: KeyMap = (esm.hub_rows if form == "hub" else esm.fair_rows)(rotary=rotary, contact_head=net.contact_head)
    check(rows, published, state)
    dropped = {row.source for row in rows if isinstance(row, Drop)}
    exported = export_weights(rows, state)
    assert {name: tensor.shape for name, tensor in exported.items()} == {
        name: tensor.shape for name, tensor in published.items() if name not in dropped
    }


@every_row
def test_configuration_is_what_the_published_config_file_gives(row: Checkpoint) -> None:
    """A row and a hub folder of the same checkpoint must build the same model."""
    expected = dataclasses.asdict(config(row))
    assert esm.hub_config(esm.hub_config_json(expected), header(row.name)) == expected


@pytest.mark.parametrize("name", [path.stem for path in sorted((WEIGHTS / "headers").glob("*.json"))])
def test_headers_are_those_of_the_reference_libraries(name: str) -> None:
    make_headers = runpy.run_path(str(Path(__file__).parent / "golden" / "make_headers.py"))
    assert (WEIGHTS / "headers" / f"{name}.json").read_text() == make_headers["document"](name)
    assert name in {row.header for row in PUBLISHED}


# Bytes of files on the hub, and of copies saved again by transformers 4.45, which leaves out the position ids.
# The hub's 8M was written by a safetensors that did not pad its header to a multiple of eight.
@pytest.mark.parametrize(
    ("name", "resaved", "published", "slack"),
    [
        ("esm2-8m", False, 31_384_292, 7),
        ("esm2-8m", True, 31_375_984, 0),
        ("esm2-35m", True, 136_000_488, 0),
        ("esm2-650m", False, 2_609_506_392, 0),
    ],
)
def test_headers_add_up_to_the_published_files(name: str, resaved: bool, published: int, slack: int) -> None:
    tensors = header(name)
    if resaved:
        del tensors["esm.embeddings.position_ids"]
    assert 0 <= safetensors_size(tensors) - published <= slack


@every_row
def test_headers_fit_the_published_original_files(row: Checkpoint) -> None:
    """A .pt holds its tensors, the tied decoder once, and at most 1 kB per tensor besides: dtypes are right, too."""
    tensors = header(row.name, "original")
    del tensors["encoder.lm_head.weight"]
    regression = {name: tensors.pop(name) for name in list(tensors) if name.startswith("contact_head.")}
    for file, held in zip(row.originals, (tensors, regression), strict=bool(regression)):
        if file.size is not None and row.name != "esm1b":  # esm1b's carries the state of the optimizer
            assert 0 < file.size - size(held) < 1000 * max(len(held), 2), file.name


def test_a_row_without_a_header_says_so() -> None:
    with pytest.raises(ValueError, match=r"plm-mini has no header on file"):
        header("plm-mini")


def test_every_published_value_belongs_to_a_row() -> None:
    """All files are read; their rows and columns exist in the model; sources, licences and reasons are given."""
    assert {path.stem for path in (WEIGHTS / "checks").glob("*.json")} <= {row.name for row in CHECKPOINTS}
    for row in PUBLISHED:
        for each in row.checks:
            tokens = each.ids or re.findall("<mask>|.", f".{each.sequence}.")
            residues, sizes = len(tokens) - 2, config(row)
            shape = {
                "nll": (1, 1),
                "contacts": (residues, residues),
                "hidden": (len(tokens), sizes.channels),
                "mean": (1, sizes.channels),
            }.get(each.what, (len(tokens), 33))
            assert max(each.rows) < shape[0] and max(each.columns) < shape[1], (row.name, each)
            assert each.layer is None or each.layer <= sizes.layers, (row.name, each)
            assert each.source and each.licence and each.because, (row.name, each)
    assert {row.name for row in PUBLISHED if not row.checks} == {"esm2-15b"}
    assert sum(path.stat().st_size for path in (WEIGHTS / "checks").glob("*.json")) < 80_000


def test_published_values_as_printed_by_their_sources() -> None:
    first = find("esm2-8m").checks[0]
    assert (first.what, first.ids, first.rows, first.columns) == ("logits", (0, 1, 2, 3, 4, 5), (0, 1, 2), (0, 1, 2))
    assert first.expected[0] == (8.921518, -10.589814, -6.4671307) and first.absolute == 1e-4
    protein = find("esm1b").checks[0]
    assert (protein.what, protein.sequence, protein.layer, protein.rows[0]) == ("hidden", "PROTEIN", 33, 1)
    printed = (-0.05955824, 0.02885942, 0.00784175, 0.2459513, 0.07759922)
    assert protein.expected[0][:5] == pytest.approx(printed, abs=1e-8)
    losses = {row.name: one.expected[0][0] for row in PUBLISHED for one in row.checks if one.what == "nll"}
    assert losses.keys() == {"esm2-8m", "esm2-35m", "esm2-150m", "esm2-650m", "esm2-3b"}
    assert all(0.5 < loss < 0.6 for loss in losses.values())
    # H24D, H24E by the five ESM-1v
    odds = [next(one for one in checks(f"esm1v-{i}") if one.what == "log_odds").expected[0][:2] for i in range(1, 6)]
    assert [round(pair[1], 6) for pair in odds] == [-1.400086, 0.176536, 0.731085, -1.078302, 1.137428]


CHECK = Check("logits", (0, 2), (1,), ((1.0,), (-2.0,)), "here", "MIT", 0.1, 0.05, "for a test", sequence="M")


def test_error_is_a_share_of_what_is_allowed() -> None:
    """The largest of all cells counts, the tolerance grows with the value, and what is not a number never passes."""
    matrix = torch.tensor([[9.0, 1.0], [9.0, 9.0], [9.0, -2.1]])
    assert CHECK.error(matrix) == pytest.approx(0.5)
    matrix[0, 1] = 1.3
    assert CHECK.error(matrix) == pytest.approx(2.0)
    matrix[0, 1] = float("nan")
    assert not CHECK.error(matrix) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"what": "loss"}, "what to be one of logits"),
        ({"ids": (1,)}, "either a sequence or ids"),
        ({"sequence": None}, "either a sequence or ids"),
        ({"layer": 1}, "a layer for hidden and mean"),
        ({"what": "hidden"}, "a layer for hidden and mean"),
        ({"expected": ((1.0,),)}, "rows by columns"),
        ({"expected": ((1.0,), (float("nan"),))}, "finite"),
        ({"rows": (0, -1)}, "from 0 upwards"),
        ({"absolute": 0.0}, "an absolute tolerance above 0"),
    ],
)
def test_malformed_checks_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CHECK, **changes)  # type: ignore[arg-type]


def test_malformed_check_files_name_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plm_weights.checks._FOLDER", tmp_path)
    (tmp_path / "x.json").write_text('[{"checks": [{"what": "nll", "expected": [[1]], "tolerance": 1}]}]')
    with pytest.raises(ValueError, match=r"x\.json, block 0, check 0: .*tolerance"):
        checks("x")
    assert checks("nobody-published-any") == ()
