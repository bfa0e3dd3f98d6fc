"""The .bin/.idx format: golden bytes, round trips, and every way a file can be wrong."""

import struct

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from megafp4.data.indexed import IndexedDataset, dtype_code, smallest_dtype
from megafp4.data.indexed_writer import IndexedWriter, merge
from megafp4.errors import DataError
from tests.data.pairs import write_pair

# Documents [258, 3], [] and [65535] as uint16, written out by hand from the specification.
GOLDEN_BIN = bytes.fromhex("0201 0300 ffff".replace(" ", ""))
GOLDEN_IDX = b"".join(
    (
        b"MMIDIDX\x00\x00",
        b"\x01\x00\x00\x00\x00\x00\x00\x00",  # version
        b"\x08",  # uint16
        b"\x03\x00\x00\x00\x00\x00\x00\x00",  # sequences
        b"\x04\x00\x00\x00\x00\x00\x00\x00",  # document boundaries
        b"\x02\x00\x00\x00" + b"\x00\x00\x00\x00" + b"\x01\x00\x00\x00",  # lengths
        b"\x00" * 8 + b"\x04" + b"\x00" * 7 + b"\x04" + b"\x00" * 7,  # byte offsets
        *(bytes([boundary]) + b"\x00" * 7 for boundary in (0, 1, 2, 3)),
    )
)


@pytest.fixture
def golden(tmp_path):
    (tmp_path / "golden.bin").write_bytes(GOLDEN_BIN)
    (tmp_path / "golden.idx").write_bytes(GOLDEN_IDX)
    return tmp_path / "golden"


def test_golden_bytes_are_written(tmp_path):
    write_pair(tmp_path / "out", [[258, 3], [], [65535]])
    assert (tmp_path / "out.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "out.idx").read_bytes() == GOLDEN_IDX


def test_golden_bytes_are_read(golden):
    dataset = IndexedDataset(golden)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[258, 3], [], [65535]]
    assert (dataset.documents, dataset.tokens, dataset.token_range()) == (3, 3, (0, 65535))
    assert dataset.get(0, 1).tolist() == [3]
    assert dataset.get(0, 1, 0).tolist() == []
    assert dataset.modes is None


def test_modes_of_multimodal_files_are_read(golden):
    golden.with_suffix(".idx").write_bytes(GOLDEN_IDX + b"\x00\x01\xff")
    assert IndexedDataset(golden).modes.tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    ("code", "name"),
    [(1, "uint8"), (2, "int8"), (3, "int16"), (4, "int32"), (5, "int64"), (8, "uint16")],
)
def test_every_dtype_code(tmp_path, code, name):
    limits = np.iinfo(name)
    documents = [[0, int(limits.max)], [int(limits.min)], [7]]
    dataset = write_pair(tmp_path / name, documents, name)
    assert (tmp_path / f"{name}.idx").read_bytes()[17] == code == dtype_code(name)
    assert dataset.dtype == np.dtype(name)
    assert [dataset[i].tolist() for i in range(3)] == documents
    assert dataset.token_range() == (min(0, limits.min), limits.max)


@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=40), max_size=30),
    dtype=st.sampled_from(["uint16", "int32", "int64"]),
)
def test_round_trip(tmp_path_factory, documents, dtype):
    dataset = write_pair(tmp_path_factory.mktemp("pair") / "x", documents, dtype)
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.tokens == sum(map(len, documents))


def test_documents_of_several_sequences(tmp_path):
    with IndexedWriter(tmp_path / "x", np.int32) as writer:
        writer.add_many(np.arange(6), [1, 2, 0, 3], documents=[2, 2])
        writer.add_many([], [], documents=[0])
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.document_index.tolist() == [0, 2, 4, 4]
    assert [dataset[i].tolist() for i in range(4)] == [[0], [1, 2], [], [3, 4, 5]]


def test_merge_equals_writing_in_one_go(tmp_path):
    parts = [[[1, 2], []], [[3]], [], [[4, 5, 6], [7]]]
    for number, documents in enumerate(parts):
        write_pair(tmp_path / f"part{number}", documents)
    merge([tmp_path / f"part{number}" for number in range(4)], tmp_path / "merged")
    write_pair(tmp_path / "whole", [document for part in parts for document in part])
    for suffix in (".bin", ".idx"):
        merged = (tmp_path / f"merged{suffix}").read_bytes()
        assert merged == (tmp_path / f"whole{suffix}").read_bytes()


def test_merge_refuses_mixed_types_and_nothing(tmp_path):
    write_pair(tmp_path / "a", [[1]], "uint16")
    write_pair(tmp_path / "b", [[1]], "int32")
    with pytest.raises(DataError, match="holds int32 tokens, not uint16"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with pytest.raises(DataError, match="no prefixes to merge"):
        merge([], tmp_path / "c")
    assert not (tmp_path / "c.bin").exists()


def test_offsets_beyond_four_gigabytes(tmp_path):
    """A sparse file: 2^31 + 5 tokens of uint16, of which only the last document is not a hole."""
    hole = 2**31 - 1
    lengths = np.array([hole, 6, 3], "<i4")
    offsets = np.array([0, 2 * hole, 2 * hole + 12], "<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)
    index = header + lengths.tobytes() + offsets.tobytes() + np.arange(4, dtype="<i8").tobytes()
    (tmp_path / "huge.idx").write_bytes(index)
    with open(tmp_path / "huge.bin", "wb") as file:
        file.seek(2 * hole + 12)
        file.write(np.array([7, 8, 9], "<u2").tobytes())
    dataset = IndexedDataset(tmp_path / "huge")
    assert dataset[2].tolist() == [7, 8, 9]
    assert dataset[1].tolist() == [0] * 6
    assert dataset.tokens == 2**31 + 8
    assert dataset.get(0, hole - 2).tolist() == [0, 0]


@pytest.mark.parametrize("size", range(len(GOLDEN_IDX)))
def test_every_truncation_of_the_index_is_noticed(golden, size):
    golden.with_suffix(".idx").write_bytes(GOLDEN_IDX[:size])
    with pytest.raises(DataError, match=r"is truncated|is not a Megatron index"):
        IndexedDataset(golden)


def test_truncated_index_says_how_much_is_missing(golden):
    golden.with_suffix(".idx").write_bytes(GOLDEN_IDX[:60])
    with pytest.raises(DataError, match=r"golden.idx is truncated: it holds 60 bytes of 102, copy"):
        IndexedDataset(golden)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"TNTIDX\x00\x00" + bytes(40), "gpt-neox TNTIDX"),
        (b"\x80\x04\x95\x10" + bytes(40), "Python pickle"),
        (b"PK\x03\x04" + bytes(40), "torch.save"),
        (b"\x93NUMPY\x01\x00" + bytes(40), "NumPy"),
        (b'{"text": "not tokens at all, but a line of JSON"}\n', "but text"),
        (b"\x1f\x8b\x08" + bytes(40), "gzip"),
        (b"PAR1" + bytes(40), "parquet"),
        (b"", "empty"),
        (bytes(range(200, 240)), "the bytes c8 c9 ca"),
    ],
)
def test_foreign_files_are_named(golden, head, name):
    golden.with_suffix(".idx").write_bytes(head)
    with pytest.raises(DataError, match="is not a Megatron index but") as caught:
        IndexedDataset(golden)
    assert name in str(caught.value)


def patched(offset: int, form: str, value: int) -> bytes:
    index = bytearray(GOLDEN_IDX)
    struct.pack_into(form, index, offset, value)
    return bytes(index)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (patched(9, "<Q", 2), "format version 2"),
        (patched(17, "<B", 6), "dtype code 6, floating-point"),
        (patched(17, "<B", 7), "dtype code 7, floating-point"),
        (patched(17, "<B", 9), "dtype code 9, an unknown type"),
        (patched(17, "<B", 0), "dtype code 0, an unknown type"),
        (patched(18, "<Q", 2**60), "is truncated"),
        (patched(26, "<Q", 2**63), "is truncated"),
        (patched(34, "<i", -1), "negative length"),
        (patched(34, "<i", 2**31 - 1), "puts sequence 0 at bytes 0 to 4294967294"),
        (patched(46, "<q", -2), "negative length or offset"),
        (patched(62, "<q", 2**63 - 1), "puts sequence 2 at bytes"),
        (patched(70, "<q", 1), "document boundaries"),
        (patched(78, "<q", 3), "document boundaries"),
        (patched(94, "<q", 2), "document boundaries"),
        (GOLDEN_IDX + b"\x00", "holds 103 bytes where its header says 102"),
    ],
)
def test_damaged_indices(golden, index, message):
    golden.with_suffix(".idx").write_bytes(index)
    with pytest.raises(DataError, match=message):
        IndexedDataset(golden)


def test_short_token_file(golden):
    golden.with_suffix(".bin").write_bytes(GOLDEN_BIN[:5])
    with pytest.raises(
        DataError, match=r"golden.bin holds 5 bytes but its index puts sequence 2 at"
    ):
        IndexedDataset(golden)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(golden, suffix):
    golden.with_suffix(suffix).unlink()
    with pytest.raises(DataError, match=rf"cannot read .*golden{suffix} \(no such file"):
        IndexedDataset(golden)


def test_suffix_given_by_mistake(golden):
    with pytest.raises(DataError, match=r"without its suffix, '.*golden'"):
        IndexedDataset(f"{golden}.bin")


@pytest.mark.parametrize(
    ("sequence", "offset", "length"),
    [(-1, 0, None), (3, 0, None), (0, 3, None), (0, 1, 2), (0, -1, 1)],
)
def test_reading_outside(golden, sequence, offset, length):
    with pytest.raises(DataError, match=r"is not one|do not lie in it"):
        IndexedDataset(golden).get(sequence, offset, length)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([65536], "65536 does not fit uint16"), ([-1], "-1 does not fit"), ([1.5], "give integers")],
)
def test_tokens_are_never_wrapped(tmp_path, tokens, message):
    with pytest.raises(DataError, match=message), IndexedWriter(tmp_path / "x") as writer:
        writer.add(tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writer_leaves_the_old_pair(golden, tmp_path):
    def fail():
        with IndexedWriter(golden) as writer:
            writer.add([1])
            raise KeyError("interrupted")

    with pytest.raises(KeyError):
        fail()
    assert golden.with_suffix(".idx").read_bytes() == GOLDEN_IDX
    assert sorted(path.name for path in tmp_path.iterdir()) == ["golden.bin", "golden.idx"]


def test_writer_errors(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        IndexedWriter(tmp_path / "file" / "x")
    with pytest.raises(DataError, match="float32 has no code"):
        IndexedWriter(tmp_path / "x", np.float32)
    with (
        pytest.raises(DataError, match="counts must agree"),
        IndexedWriter(tmp_path / "y") as writer,
    ):
        writer.add_many([1, 2, 3], [1, 1])


def test_files_are_readable_by_others(tmp_path):
    """On a cluster, one user prepares data for all: the umask decides, not a private temporary."""
    plain = tmp_path / "plain"
    plain.write_text("")
    write_pair(tmp_path / "x", [[1]])
    assert (tmp_path / "x.bin").stat().st_mode == (tmp_path / "x.idx").stat().st_mode
    assert (tmp_path / "x.bin").stat().st_mode == plain.stat().st_mode


def test_smallest_dtype_follows_megatron():
    assert smallest_dtype(65499) == np.uint16
    assert smallest_dtype(65500) == np.int32
