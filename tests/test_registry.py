"""Rows, headers and published values of every checkpoint, proven without a download."""

import hashlib
import json
import re
import runpy
from dataclasses import asdict, replace
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
from plm_weights.registry import CHECKPOINTS, Checkpoint, File, Form, find, header

WEIGHTS = Path(registry.__file__).parent
PUBLISHED = [row for row in CHECKPOINTS if row.header]
FRAME = {"esm": 2, "bert": 2, "t5": 1, "progen2": 0, "esmfold": 0}  # tokens around the residues, without a task
every_esm = pytest.mark.parametrize("row", [row for row in PUBLISHED if row.family == "esm"], ids=lambda row: row.name)


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


def test_every_checkpoint_of_the_families_has_a_row() -> None:
    assert [row.name for row in CHECKPOINTS] == [
        *("plm-mini", "esm2-8m", "esm2-35m", "esm2-150m", "esm2-650m", "esm2-3b", "esm2-15b"),
        *("esm1b", "esm1v-1", "esm1v-2", "esm1v-3", "esm1v-4", "esm1v-5"),
        *("ankh-base", "ankh-large", "ankh2-large", "ankh3-large", "ankh3-xl"),
        *("prott5-xl-u50", "prott5-xl-bfd", "prott5-xl-half", "prostt5", "prostt5-fp16", "igt5", "igt5-unpaired"),
        *("igbert", "igbert-unpaired", "protbert", "protbert-bfd"),
        *("progen2-small", "progen2-medium", "progen2-oas", "progen2-base"),
        *("progen2-large", "progen2-bfd90", "progen2-xlarge"),
        "proteinbert",
        *("esmfold", "esmfold-v0"),
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
        assert all((row.licence, row.citation, row.hub or row.folder or row.originals)), row.name
        assert row.pairs is (row.name in ("igbert", "igt5")), row.name
        if row.header:
            assert row.config and row.parameters and "doi:10." in row.citation, row.name
            assert row.revision or row.preferred == "original" or row.name == "esm2-15b", "nobody stated a commit of it"
    originals = {file for row in CHECKPOINTS for file in row.originals}  # an ESMFold's includes its language model's
    hashes = [sha256 for file in originals for sha256 in file.sha256]
    assert len(hashes) == len(set(hashes)) == 21
    weights = [sha256 for row in CHECKPOINTS for file in row.files if "model" in file.name for sha256 in file.sha256]
    assert len(weights) == len(set(weights)) + 1 == 21, "two rows share a spiece.model"


def test_terms_of_use_are_told() -> None:
    for row in CHECKPOINTS:
        assert ("non-commercial" in row.licence) == row.name.startswith("ankh"), row.name
    assert find("igbert").licence == find("igt5-unpaired").licence == "MIT (hub), CC BY 4.0 (Zenodo)"
    assert {find(name).licence for name in ("prott5", "prott5-half", "protbert", "protbert-bfd")} == {"AFL-3.0"}


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
        ("elnaggarlab/ankh3-large", "ankh3-large"),
        ("ankh2-ext2", "ankh2-large"),
        ("ankh3_xl", "ankh3-xl"),
        ("prot_t5_xl_uniref50", "prott5-xl-u50"),
        ("ProtT5", "prott5-xl-u50"),
        ("Rostlab/prot_t5_xl_half_uniref50-enc", "prott5-xl-half"),
        ("ProstT5_fp16", "prostt5-fp16"),
        ("igt5-paired", "igt5"),
        ("Exscientia/IgBert", "igbert"),
        ("igbert-paired", "igbert"),
        ("IgBert_unpaired", "igbert-unpaired"),
        ("prot_bert_bfd", "protbert-bfd"),
        ("progen2-BFD90", "progen2-bfd90"),
        ("progen2_medium", "progen2-medium"),
        ("hugohrban/progen2-bfd90", "progen2-bfd90"),
        ("GrimSqueaker/proteinBERT", "proteinbert"),
        ("facebook/esmfold_v1", "esmfold"),
        ("esmfold_3B_v1", "esmfold"),
        ("ESMFold-v1", "esmfold"),
        ("esmfold_v0", "esmfold-v0"),
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


@every_esm
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


@every_esm
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


@every_esm
def test_configuration_is_what_the_published_config_file_gives(row: Checkpoint) -> None:
    """A row and a hub folder of the same checkpoint must build the same model."""
    expected = asdict(config(row))
    assert esm.hub_config(esm.hub_config_json(expected), header(row.name)) == expected


@pytest.mark.parametrize(
    ("script", "table"),
    [
        ("make_headers", "MODELS"),
        ("make_headers_t5_bert", "HEADERS"),
        ("make_headers_progen2", "HEADERS"),
        ("make_headers_proteinbert", "HEADERS"),
        ("make_headers_esmfold", "HEADERS"),
    ],
)
def test_headers_are_those_of_the_reference_libraries(script: str, table: str) -> None:
    make_headers = runpy.run_path(str(Path(__file__).parent / "golden" / f"{script}.py"))
    for name in make_headers[table]:
        assert (WEIGHTS / "headers" / f"{name}.json").read_text() == make_headers["document"](name)


def test_every_header_belongs_to_a_row() -> None:
    assert {path.stem for path in (WEIGHTS / "headers").glob("*.json")} == {row.header for row in PUBLISHED}


# Bytes of files on the hub, and of copies saved again by transformers 4.45, which leaves out the position ids.
# The hub's 8M was written by a safetensors that did not pad its header to a multiple of eight.
@pytest.mark.parametrize(
    ("name", "resaved", "published", "slack"),
    [
        ("esm2-8m", False, 31_384_292, 7),
        ("esm2-8m", True, 31_375_984, 0),
        ("esm2-35m", True, 136_000_488, 0),
        ("esm2-650m", False, 2_609_506_392, 0),
        ("igbert", False, 1_679_791_776, 0),
        ("igbert-unpaired", False, 1_679_791_776, 0),
    ],
)
def test_headers_add_up_to_the_published_files(name: str, resaved: bool, published: int, slack: int) -> None:
    tensors = header(name)
    assert resaved or File("model.safetensors", published) in [replace(file, sha256=()) for file in find(name).files]
    if resaved:
        del tensors["esm.embeddings.position_ids"]
    assert 0 <= safetensors_size(tensors) - published <= slack


@every_esm
def test_headers_fit_the_published_original_files(row: Checkpoint) -> None:
    """A .pt holds its tensors, the tied decoder once, and at most 1 kB per tensor besides: dtypes are right, too."""
    tensors = header(row.name, "original")
    del tensors["encoder.lm_head.weight"]
    regression = {name: tensors.pop(name) for name in list(tensors) if name.startswith("contact_head.")}
    for file, held in zip(row.originals, (tensors, regression), strict=bool(regression)):
        if file.size is not None and row.name != "esm1b":  # esm1b's carries the state of the optimizer
            assert 0 < file.size - size(held) < 1000 * max(len(held), 2), file.name


# Tensors and values with all copies, as far as somebody counted them; and values without copies.
@pytest.mark.parametrize(
    ("name", "stored", "unique"),
    [
        ("ankh-base", (776, 736_674_816), 736_453_632),
        ("ankh-large", (776, 1_879_147_520), 1_878_705_152),
        ("ankh2-large", (776, 1_879_147_520), 1_878_705_152),
        ("ankh3-large", (776, 1_879_835_648), 1_879_049_216),
        ("ankh3-xl", (776, 5_732_217_856), 5_730_907_136),
        ("protbert", None, 420_984_864),
        ("protbert-bfd", None, 420_984_864),
    ],
)
def test_headers_have_the_published_totals(name: str, stored: tuple[int, int] | None, unique: int) -> None:
    tensors = header(name)
    assert stored in (None, (len(tensors), sum(tensor.numel() for tensor in tensors.values())))
    copies = re.compile(r"(en|de)coder\.embed_tokens\.weight|cls\.predictions\.decoder\.weight")
    assert unique == sum(tensor.numel() for key, tensor in tensors.items() if not copies.fullmatch(key))
    assert unique == find(name).parameters


@pytest.mark.parametrize("name", ["ankh-base", "prott5-xl-u50", "prott5-xl-bfd", "prott5-xl-half", "protbert"])
def test_headers_fit_the_published_bin_files(name: str) -> None:
    """They hold each number once, whatever copies they name, and less than 500 bytes per tensor besides."""
    row, tensors = find(name), header(name)
    (itemsize,) = {tensor.element_size() for tensor in tensors.values()}
    (published,) = (file.size for file in row.files if file.name == "pytorch_model.bin")
    assert row.parameters is not None and published is not None
    assert 0 < published - itemsize * row.parameters < 500 * len(tensors)


def test_a_lacking_header_is_said() -> None:
    with pytest.raises(ValueError, match=r"plm-mini has no header on file"):
        header("plm-mini")
    with pytest.raises(ValueError, match=r"ankh3-xl was published in the hub's form only.*'original'"):
        header("ankh3-xl", "original")


def test_every_published_value_belongs_to_a_row() -> None:
    """All files are read; their rows and columns exist in the model; sources, licences and reasons are given."""
    files = [*(WEIGHTS / "checks").glob("*.json")]
    assert {path.stem for path in files} <= {row.name for row in CHECKPOINTS}
    for row in PUBLISHED:
        for each in row.checks:
            assert row.config is not None
            channels, vocabulary = (int(row.config.get(key) or 33) for key in ("channels", "vocabulary"))
            residues = len(re.findall("<mask>|.", each.sequence)) if each.sequence else 0
            tokens = len(each.ids or ()) or residues + FRAME[row.family]
            shape = {
                "nll": (1, 1),
                "causal_nll": (1, 1),
                "ll_sum": (1, 1),
                "ll_mean": (1, 1),
                "log_likelihood": (1, 1),
                "masked_probabilities": (residues, vocabulary),
                "contacts": (residues, residues),
                "hidden": (tokens, channels),
                "mean": (1, channels),
                "backbone": (3 * residues, 3),
                "plddt": (1, 1),
                "ptm": (1, 1),
            }.get(each.what, (tokens, vocabulary))
            assert max(each.rows) < shape[0] and max(each.columns) < shape[1], (row.name, each)
            layers = row.config["structure"]["layers"] - 1 if each.what == "backbone" else row.config.get("layers")
            assert each.layer is None or each.layer <= int(layers or 0), (row.name, each)
            assert each.source and each.licence and each.because, (row.name, each)
    unchecked = {"esm2-15b", "prostt5", "prostt5-fp16", "igt5", "igt5-unpaired", "proteinbert", "esmfold-v0"}
    assert {row.name for row in PUBLISHED if not row.checks} == unchecked
    assert sum(path.stat().st_size for path in files) < 125_000


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


def test_published_values_of_t5_and_bert_as_printed_by_their_sources() -> None:
    """First values of each source, read by eye where it printed them."""
    first = {name: find(name).checks[0] for name in ("prott5", "prott5-half", "protbert-bfd", "ankh3-xl", "igbert")}
    for name in ("prott5", "prott5-half"):
        assert (first[name].sequence, first[name].rows[0], first[name].layer) == ("PRXTEIN", 0, 24)
        assert first[name].expected[0][:3] == (0.02704864, -0.1272434, -0.1680849)
    assert (first["protbert-bfd"].rows[0], first["protbert-bfd"].layer) == (1, 30)
    assert first["protbert-bfd"].expected[0][:3] == (0.05733505, 0.0180673, 0.04877437)
    masked = next(one for one in find("protbert-bfd").checks if one.what == "masked_probabilities")
    assert masked.sequence == "MLIV" and dict(zip(masked.columns, masked.expected[0], strict=True))[19] == 0.03282926
    sums = {name: [one.expected for one in find(name).checks if one.what == "log_likelihood"] for name in first}
    assert sums.pop("igbert") == [((-34.7425,),)] and not any(sums.values())
    assert first["igbert"].sequence == "EVQLVESGGGLVQ|DIQMTQ"
    for row in CHECKPOINTS:
        if row.name.startswith("ankh"):
            assert [one.what for one in row.checks] == ["hidden"] * 3 + ["mean"] * 3
            assert {one.layer for one in row.checks} == {48}
            # what tells nothing: a bound as large as the values
            assert all(one.absolute < 0.5 * max(abs(x) for row in one.expected for x in row) for one in row.checks)


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
        ({"layer": 1}, "a layer for hidden, mean, backbone"),
        ({"what": "hidden"}, "a layer for hidden, mean, backbone"),
        ({"sequence": None, "ids": (1,), "task": "nlu"}, "a sequence where there is a task"),
        ({"what": "ll_sum", "sequence": None, "ids": (1,)}, "a sequence for ll_sum, ll_mean"),
        ({"expected": ((1.0,),)}, "rows by columns"),
        ({"expected": ((1.0,), (float("nan"),))}, "finite"),
        ({"rows": (0, -1)}, "from 0 upwards"),
        ({"absolute": 0.0}, "an absolute tolerance above 0"),
    ],
)
def test_malformed_checks_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CHECK, **changes)  # type: ignore[arg-type]


def test_malformed_check_files_name_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plm_weights.checks._FOLDER", tmp_path)
    (tmp_path / "x.json").write_text('[{"checks": [{"what": "nll", "expected": [[1]], "tolerance": 1}]}]')
    with pytest.raises(ValueError, match=r"x\.json, block 0, check 0: .*tolerance"):
        checks("x")
    assert checks("nobody-published-any") == ()
