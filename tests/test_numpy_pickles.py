"""ProteinBERT's pickle of numpy arrays: read exactly and lazily, written byte for byte, and never run."""

from __future__ import annotations

import os
import pickle
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FIXTURE_IS_CONSTANT, equal, same, save
from hypothesis import given
from hypothesis import strategies as st
from test_hostile_pickles import LAUGHS, Call, attacks
from torch import Tensor

from plm_weights import CheckpointError, TensorSource, open_tensors, write_proteinbert

GOLDEN = Path(__file__).parent / "golden" / "proteinbert"
CASES = ("tiny_2blocks", "padding_3blocks", "finetune_heads")
PROTOCOLS = pytest.mark.parametrize("protocol", [3, 4])
Array = np.ndarray[Any, Any]


def arrays() -> list[Array]:
    """Few bytes and many, no axes and several, none at all, and a NaN with a message."""
    strange = np.array([0x7FC12345, 0xFF800001], np.uint32).view(np.float32)
    return [
        np.ones((2, 3), np.float32),
        np.arange(70, dtype=np.float32),
        np.array(3, np.float32),
        strange[:0],
        strange,
    ]


def content(weights: object, optimizer: object = None, annotations: object = 2, protocol: int = 3) -> bytes:
    return pickle.dumps((annotations, weights, optimizer), protocol)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refused(path: Path, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as error:
        open_tensors(path)
    assert str(path) in str(error.value)


def told_by_numpy(path: Path) -> dict[str, Tensor]:
    _, weights, _ = pickle.loads(path.read_bytes())
    return {f"{place:03d}": torch.from_numpy(array.copy()) for place, array in enumerate(weights)}


# ------------------------------------------------------------------------------------------------ what numpy writes


@PROTOCOLS
@pytest.mark.parametrize("optimizer", [None, [], [np.int64(7), np.float32(0.5), np.zeros((2, 3), np.float32)]])
def test_every_array_is_read_as_it_was_saved(protocol: int, optimizer: object, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pkl", content(arrays(), optimizer, protocol=protocol))
    source = open_tensors(path)
    assert list(source) == ["000", "001", "002", "003", "004"]
    assert source.extras == {"n_annotations": 2} and source.files == (path,)
    assert equal(source, told_by_numpy(path))
    for name, meta in source.meta.items():
        assert (meta.device.type, meta.dtype, meta.shape) == ("meta", torch.float32, source[name].shape)


@pytest.mark.parametrize("case", CASES)
def test_goldens_are_read_as_numpy_reads_them(case: str) -> None:
    """Written by a numpy before 2, which spells its names otherwise than this one."""
    path = GOLDEN / case / "weights.pkl"
    assert b"numpy.core.multiarray" in path.read_bytes() and b"numpy._core" in content(arrays())
    assert equal(open_tensors(path), told_by_numpy(path))


def test_dtypes_as_old_versions_of_numpy_tell_them(tmp_path: Path) -> None:
    """Their two flags were numbers."""
    data = content(arrays())
    assert data.count(b"\x89\x88\x87") == 1
    path = write(tmp_path / "x.pkl", data.replace(b"\x89\x88\x87", b"K\0K\1\x87"))
    assert equal(open_tensors(path), told_by_numpy(path))


@pytest.mark.parametrize("annotations", [0, 255, 256, 8943, 70_000])
@PROTOCOLS
def test_the_kind_of_a_file_is_seen_in_its_bytes(annotations: int, protocol: int, tmp_path: Path) -> None:
    for name in ("weights", "x.bin", "x.pt", "x.safetensors"):
        path = write(tmp_path / name, content(arrays(), annotations=annotations, protocol=protocol))
        assert open_tensors(path).extras == {"n_annotations": annotations}
        save({"a": torch.ones(2)}, path, legacy=True, protocol=protocol)
        assert open_tensors(path).keys() == {"a"}


def test_the_state_of_the_optimizer_is_not_kept(tmp_path: Path) -> None:
    """While it is passed over, one array at a time is in memory."""
    size = 2**20
    whole = [np.zeros(size, np.float32) for _ in range(2)]
    path = write(tmp_path / "x.pkl", content(whole[:1], [np.int64(1), *[array.copy() for array in whole * 4]]))
    assert path.stat().st_size > 9 * 4 * size
    del whole
    tracemalloc.start()
    source = open_tensors(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(source) == ["000"] and kept < size / 10
    # One array, and the one before it until that has taken its place.
    assert peak < 2.1 * 4 * size


# ------------------------------------------------------------------------------------------------ what we write


def written(source: TensorSource, path: Path) -> bytes:
    annotations = source.extras["n_annotations"]
    assert isinstance(annotations, int)
    write_proteinbert(path, source, annotations)
    return path.read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_written_byte_for_byte_as_published(case: str, tmp_path: Path) -> None:
    """All of the model; in place of the optimizer's list there is None."""
    theirs = (GOLDEN / case / "weights.pkl").read_bytes()
    ours = written(open_tensors(GOLDEN / case / "weights.pkl"), tmp_path / "weights.pkl")
    model, end = re.fullmatch(rb"(.*b)(eN\x87[qr].{1,4}\.)", ours, re.DOTALL).groups()  # type: ignore[union-attr]
    assert theirs.startswith(model + b"e]") and ours == model + end
    assert pickle.loads(ours)[::2] == (pickle.loads(theirs)[0], None)


def test_written_as_python_itself_would(tmp_path: Path) -> None:
    """Whatever the sizes: the same as pickle's, but for the name that numpy has had since 2."""
    several = [array for array in arrays() * 30 if array.size]  # no bytes at all are one object, told once
    for weights, count in ((arrays(), 255), (several, 256), (arrays()[:2], 70_000)):
        theirs = content([array.copy() for array in weights], annotations=count)  # as is an array that comes again
        ours = written(open_tensors(write(tmp_path / "theirs", theirs)), tmp_path / "ours")
        assert ours == theirs.replace(b"numpy._core", b"numpy.core")


def test_other_dtypes_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"x\.pkl: .* are float16, float64: leave out dtype, or choose dtype='float32'"
    ):
        write_proteinbert(tmp_path / "x.pkl", {"000": torch.ones(2).half(), "001": torch.ones(2).double()}, 2)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ torn


@PROTOCOLS
def test_a_torn_file_is_an_error_wherever_it_is_cut(protocol: int, tmp_path: Path) -> None:
    data = content(arrays(), [np.int64(1), np.ones(2, np.float32)], protocol=protocol)
    for cut in range(len(data)):
        refused(write(tmp_path / "torn.pkl", data[:cut]), "fetch it again")


def test_more_than_the_pickle(tmp_path: Path) -> None:
    refused(write(tmp_path / "x.pkl", content(arrays()) + b"x"), "something follows its pickle")


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pkl", content(arrays()))
    source = open_tensors(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="became shorter"):
        source["001"]


# ------------------------------------------------------------------------------------------------ foreign


@PROTOCOLS
@pytest.mark.parametrize(
    ("root", "says"),
    [
        ((arrays(), [np.int64(1)]), "two items, weights and an optimizer's state, as the authors' first files"),
        ((arrays(), None), "two items"),
        (arrays(), "a list of 5 weights alone, as of a model that was fine-tuned"),
        ((2, arrays(), [], []), "it holds 4 items; wanted is .n_annotations, weights, optimizer_weights."),
        ((2, arrays(), {}), "it holds 3 items"),
        ((2, [*arrays(), "x", 3], None), "2 of its 7 weights are no arrays"),
        ((2, [arrays()], None), "1 of its 1 weights are no arrays"),
        ((2, [np.ones(2)], None), "dtype 'f8'; ProteinBERT's are 'f4', float32"),
        ((2, [np.ones(2, np.float16)], None), "dtype 'f2'"),
        ((2, [np.ones(2, np.int64)], None), "dtype 'i8'"),
        ((2, [np.ones(2, ">f4")], None), "big-endian"),
        ((2, [np.array([None])], None), "dtype 'O8'"),
        ((2, [np.array(["x"])], None), "dtype 'U1'"),
        ((2, [np.zeros(2, [("a", "f4")])], None), "dtype 'V4'"),
        ((2, [np.ones((2, 3), np.float32, order="F")], None), r"array \(2, 3\) lies in Fortran's order"),
        ((2, [], [np.float64(1)]), "dtype 'f8'"),
        ((2, [], [np.zeros(2, "m8[s]")]), "dtype 'm8'"),
        ((2, [np.ma.masked_array(np.ones(2, np.float32))], None), "numpy.ma.core._mareconstruct"),
        ((2, [torch.ones(2)], None), "torch._utils._rebuild_tensor_v2"),
    ],
)
def test_what_is_not_proteinberts_is_refused(root: object, says: str, protocol: int, tmp_path: Path) -> None:
    refused(write(tmp_path / "x.pkl", pickle.dumps(root, protocol)), says)


@pytest.mark.parametrize("protocol", [0, 1, 2, 5])
def test_other_protocols_say_what_to_do(protocol: int, tmp_path: Path) -> None:
    data = content(arrays(), protocol=protocol)
    told = "5, which lays" if protocol == 5 else "0, 1 or 2, which make"
    refused(write(tmp_path / "x.pkl", data), rf"a pickle of ProteinBERT: it is of protocol {told} .*with protocol=4")


@PROTOCOLS
@pytest.mark.parametrize("annotations", [np.int64(2), 2.0, True, None])
def test_a_first_item_that_is_no_whole_number(annotations: object, protocol: int, tmp_path: Path) -> None:
    data = content(arrays(), annotations=annotations, protocol=protocol)
    refused(
        write(tmp_path / "x.bin", data),
        r"a pickle of ProteinBERT: its first item, .*, is no whole .* int\(n_annotations",
    )


# ------------------------------------------------------------------------------------------------ hostile


@pytest.mark.parametrize("place", ["weight", "optimizer", "bytes of an array", "dtype"])
@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_a_pickle_that_would_run_code_does_not(attack: str, place: str, tmp_path: Path) -> None:
    """Every attack of torch's pickles, in each part of one of numpy's."""
    marker = tmp_path / "marker"
    hostile, name = attacks(marker)[attack]
    body = re.sub(rb"^\x80.(\x95.{8})?", b"", hostile, flags=re.DOTALL)[:-1]
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R"
    data = {
        "weight": b"\x80\x04K\2](" + body + b"eN\x87.",
        "optimizer": b"\x80\x04K\2]](" + body + b"e\x87.",
        "bytes of an array": b"\x80\x04K\2](" + array + b"(K\1K\0\x85cnumpy\ndtype\n" + body + b"tbeN\x87.",
        "dtype": b"\x80\x04K\2](" + array + b"cnumpy\ndtype\n" + body + b"ReN\x87.",
    }[place]
    path = write(tmp_path / "x.pkl", data)
    refused(path, r"cannot be read as a pickle of ProteinBERT")
    if name != "argparse.Namespace.__class__":  # whose frame was cut off with its protocol
        with pytest.raises(CheckpointError, match=re.escape(name) + "|argparse.Namespace"):
            open_tensors(path)
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Guards the test above: with Python's own unpickler an attack among the weights does leave its marker."""
    data = content([Call(os.system, f"echo > {tmp_path / 'marker'}")])
    pickle.loads(data)
    assert (tmp_path / "marker").exists()
    refused(write(tmp_path / "x.pkl", data), r"posix\.system|nt\.system")


@pytest.mark.parametrize(
    ("body", "says"),
    {
        "a function of numpy": (b"cnumpy\nload\nX\1\0\0\0x\x85R", "numpy.load"),
        "a method of an array": (b"\x8c\5numpy\x8c\x0endarray.tofile\x93X\1\0\0\0x\x85R", "numpy.ndarray.tofile"),
        "a class where a function belongs": (b"cnumpy\nndarray\nK\0\x85R", "calls numpy.ndarray with arguments"),
        "another class": (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\0\x85C\1b\x87R", "_reconstruct"),
        "an array of a size at once": (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x09\x85C\1b\x87R",
            "_reconstruct",
        ),
        "a string where bytes belong": (b"cnumpy\ndtype\nC\2f4\x89\x88\x87R", "calls numpy.dtype"),
        "an aligned dtype": (b"cnumpy\ndtype\nX\2\0\0\0f4\x88\x88\x87R", "calls numpy.dtype"),
        "a scalar too long": (
            b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\2\0\0\0i8\x89\x88\x87R(K\3X\1\0\0\0<NNNJ\xff\xff\xff\xff"
            b"J\xff\xff\xff\xffK\0tbC\x09123456789\x86R",
            "multiarray.scalar",
        ),
        "a call of a number": (b"K\1)R", "calls int"),
        "state of a number": (b"K\1}b", "calls a int"),
        "state of a list": (b"]}b", "calls a list"),
        "a reference outside": (b"K\1Q", "outside itself"),
        "a dict": (b"}K\1K\2s", "1 of its 1 weights are no arrays"),
        "bytes alone": (b"C\1x", "1 of its 1 weights are no arrays"),
        "an unknown memo": (b"h\x07", "malformed"),
        "an exabyte": (b"\x8e" + struct.pack("<Q", 2**60) + b"x", "item of|torn"),
        "a string of a terabyte": (b"\x8d" + struct.pack("<Q", 2**40) + b"x", "item of|torn"),
        "bytes that are not there": (b"B\xff\xff\xff\x0f", "expected 268435455 bytes"),
        "a tower of references": (b"K\x01q\x00" + LAUGHS, "no arrays"),
        "a dict by a tower": (b"K\x01q\x00" + LAUGHS + b"}h<K\x01s", "tuple as the key"),
        "a call of a tower": (b"K\x01q\x00" + LAUGHS + b"cnumpy\ndtype\nh<R", "calls numpy.dtype"),
        "a shape of a tower": (
            b"K\x01q\x00" + LAUGHS + b"cnumpy\ndtype\nX\2\0\0\0f4\x89\x88\x87Rh<b",
            "calls a Dtype",
        ),
        "a name of a tower": (b"K\x01q\x00" + LAUGHS + b"\x8c\5numpyh<\x93", "a name that is not a string"),
        "a module of a tower": (b"K\x01q\x00" + LAUGHS + b"h<\x8c\5dtype\x93", "a name that is not a string"),
        "a list that holds itself": (b"]q\x00h\x00a", "no arrays"),
        "nothing": (b"", "0 of its|eof|malformed|arrays|list"),
    }.values(),
)
def test_absurd_pickles_are_refused(body: bytes, says: str, tmp_path: Path) -> None:
    """Claims without substance, and structures made to exhaust a reader that hashes, compares or prints them."""
    if body:
        refused(write(tmp_path / "x.pkl", b"\x80\x04K\2](" + body + b"eN\x87."), says)
    refused(write(tmp_path / "x.pkl", b"\x80\x04K\2]" + body + b"."), "cannot be read as a pickle of ProteinBERT")


@pytest.mark.parametrize("data", [b"\x80\x04]R.", b"\x80\x04]eeee.", b"\x80\x04K\2]\x87R."])
def test_an_empty_stack(data: bytes, tmp_path: Path) -> None:
    refused(write(tmp_path / "x.pkl", data), "malformed|treats|calls")


def handmade(shape: tuple[int, ...], data: bytes, state: bytes = b"", **dtype: bytes) -> bytes:
    """One array that claims whatever it is told."""
    code, order = dtype.get("code", b"f4"), dtype.get("order", b"<")
    told = b"(" + b"".join(b"\x8a\x09" + size.to_bytes(9, "little", signed=True) for size in shape) + b"t"
    made = b"cnumpy\ndtype\nX" + struct.pack("<I", len(code)) + code + b"\x89\x88\x87R"
    made += b"(K\3X" + struct.pack("<I", len(order)) + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    raw = b"B" + struct.pack("<I", len(data)) + data
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R(K\1"
        + told
        + made
        + b"\x89"
        + raw
        + b"tb"
    )
    return b"\x80\x03K\2](" + array + state + b"eN\x87."


def test_handmade_arrays_are_as_numpy_makes_them(tmp_path: Path) -> None:
    """Guards the test below: an honest handmade file is accepted, also by numpy."""
    path = write(tmp_path / "x.pkl", handmade((1, 2), np.arange(2, dtype=np.float32).tobytes()))
    assert same(open_tensors(path)["000"], torch.tensor([[0.0, 1.0]])) and equal(
        open_tensors(path), told_by_numpy(path)
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (handmade((2, 3), bytes(20)), r"array \(2, 3\) has 20 bytes, wanted 24"),
        (handmade((2, 3), bytes(28)), "has 28 bytes, wanted 24"),
        (handmade((2**59, 2), bytes(4)), "has 4 bytes, wanted"),
        (handmade((2**62, 2**62), bytes(4)), "larger than any memory"),
        (handmade((0, 2**62, 2**62), b""), r"an array \(0, .*\), larger than any memory"),
        (handmade((2**63,), bytes(4)), "where a count belongs"),
        (handmade((-1, -1), bytes(4)), "where a count belongs"),
        (handmade((1,) * 33, bytes(4)), "33 axes"),
        (handmade((1,), bytes(4), order=b">"), "big-endian"),
        (handmade((1,), bytes(4), order=b"="), "big-endian"),
        (handmade((1,), bytes(8), code=b"i8"), "dtype 'i8'"),
        (handmade((1,), bytes(4), code=b"f4" * 10**5), "dtype 'f4f4f4f4f4f4f4f4f4f4'"),
        (handmade((1,), bytes(4), state=b"(K\1)N\x89Ntb"), "calls a StoredArray"),
    ],
)
def test_an_array_must_be_what_it_claims(data: bytes, says: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "x.pkl", data), says)


@PROTOCOLS
@FIXTURE_IS_CONSTANT
@given(data=st.data())
def test_a_damaged_pickle_is_read_or_refused(protocol: int, tmp_path: Path, data: st.DataObject) -> None:
    """No other exception than CheckpointError, whatever bytes change."""
    damaged = bytearray(content(arrays(), [np.int64(1)], protocol=protocol))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path / "damaged.pkl", damaged)
    try:
        source = open_tensors(path)
        assert all(source[name].shape == source.meta[name].shape for name in source)
    except CheckpointError:
        pass
