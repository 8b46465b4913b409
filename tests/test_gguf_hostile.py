# SPDX-License-Identifier: Apache-2.0
"""Damaged and malicious GGUF files: each refused with its own words, at once, and never by another exception."""

import time
import tracemalloc
from itertools import count
from pathlib import Path

import pytest
from gguf_files import ARCHITECTURE, T, Tensor, V, array, gguf_bytes, open_bytes, string, u32, u64
from hypothesis import given
from hypothesis import strategies as st

from ktx_jax.gguf.reader import GGUFError, open_gguf

HUGE = 2**60
MOST = 2**64 - 1


def kv(*entries):
    return gguf_bytes(metadata=entries)


def tensors(*table, **options):
    return gguf_bytes([ARCHITECTURE], table, **options)


def alignment(kind, value):
    return kv(("general.alignment", kind, value))


HOSTILE = {
    # What the file is.
    "empty": (b"", r"empty \(0 bytes\)"),
    "three bytes": (b"GGU", r"the magic takes 4 bytes at offset 0, but the file ends at 3"),
    "bad magic": (gguf_bytes(magic=b"GGML"), r"not a GGUF file but something that begins with b'GGML"),
    "swapped magic": (gguf_bytes(magic=b"FUGG"), r"byte-swapped \(big-endian\)"),
    "swapped version": (gguf_bytes(version=3 << 24), r"byte-swapped \(big-endian\) GGUF file, version 3"),
    "version 0": (gguf_bytes(version=0), r"version 0, which does not exist"),
    "version 1": (gguf_bytes(version=1), r"version 1, the first form of 2023"),
    "version 4": (gguf_bytes(version=4), r"version 4, newer than this program or damaged"),
    "safetensors": (u64(16) + b'{"a":{"dtype":1}}', r"probably a safetensors file"),
    "zip": (b"PK\x03\x04" + bytes(60), r"a zip archive, perhaps a PyTorch checkpoint"),
    "ggjt": (b"tjgg" + bytes(60), r"a GGJT file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", r"Git LFS pointer.*git lfs pull"),
    "web page": (b"<!doctype html><html></html>", r"a web page, not the model"),
    # Counts and lengths that are claims only.
    "no counts": (b"GGUF" + u32(3), r"number of tensors takes 8 bytes at offset 8, but the file ends at 8"),
    "2^60 keys": (gguf_bytes(n_keys=HUGE), r"header of 1152921504606846976 metadata keys and 0 tensors"),
    "2^60 tensors": (gguf_bytes(n_tensors=HUGE), r"1 metadata keys and 1152921504606846976 tensors"),
    "all counts": (gguf_bytes(n_keys=MOST, n_tensors=MOST), r"18446744073709551615 metadata keys"),
    "a key too many": (gguf_bytes(n_keys=2), r"header of 2 metadata keys and 0 tensors|metadata key 1"),
    "key length": (b"GGUF" + u32(3) + u64(0) + u64(1) + u64(MOST) + bytes(64), r"metadata key 0 takes 1844674"),
    "string length": (kv(("a", V.STRING, u64(HUGE))), r"the value of 'a' takes 1152921504606846976 bytes"),
    "array length": (
        kv(("a", V.ARRAY, u32(V.UINT8) + u64(HUGE))),
        r"the value of 'a' takes 1152921504606846976 bytes",
    ),
    "array overflow": (
        kv(("a", V.ARRAY, u32(V.UINT64) + u64(2**61 + 1))),
        r"the value of 'a' takes 18446744073709551624 bytes",
    ),
    "string array": (kv(("a", V.ARRAY, u32(V.STRING) + u64(HUGE))), r"array of 1152921504606846976 strings"),
    "string in array": (
        kv(("a", V.ARRAY, u32(V.STRING) + u64(2) + string("x") + u64(HUGE))),
        r"item 1 of the value of 'a' takes 1152921504606846976 bytes",
    ),
    "strings run out": (
        kv(("a", V.ARRAY, u32(V.STRING) + u64(2) + string("xxxxxxxxx"))),
        r"the length of item 1 of the value of 'a' takes 8 bytes",
    ),
    "name length": (
        b"GGUF" + u32(3) + u64(1) + u64(0) + u64(MOST) + bytes(64),
        r"the name of tensor 0 takes 18446744073709551615 bytes",
    ),
    # Metadata.
    "empty key": (kv(("", V.UINT8, 1)), r"metadata key 0 is empty"),
    "long key": (kv(("k" * 65536, V.UINT8, 1)), r"metadata key 0 is 'k+'\.\.\. \(65536 char.*allows 65535"),
    "duplicate key": (kv(("a", V.UINT8, 1), ("a", V.UINT8, 1)), r"metadata key 'a' occurs twice"),
    "key not UTF-8": (kv((b"a\xff", V.UINT8, 1)), r"metadata key 0 is not valid UTF-8 \(byte 1 of 2\)"),
    "value not UTF-8": (kv(("a", V.STRING, string(b"\xc3"))), r"value of 'a' is not valid UTF-8.*\\\\xc3"),
    "token not UTF-8": (
        kv(("a", V.ARRAY, array(V.STRING, [b"ok", b"\xed\xa0\x80"]))),
        r"item 1 of the value of 'a' is not valid UTF-8",
    ),
    "unknown value type": (kv(("a", 13, b"\0")), r"'a' has the unknown value type 13; GGUF defines 0 to 12"),
    "unknown item type": (kv(("a", V.ARRAY, u32(99) + u64(0))), r"an item of the value of 'a'.*type 99"),
    "nested array": (
        kv(("a", V.ARRAY, u32(V.ARRAY) + u64(1) + array(V.UINT8, [1]))),
        r"'a' is an array of arrays; nested",
    ),
    "bool 2": (kv(("a", V.BOOL, b"\x02")), r"'a' is a bool stored as 2; only 0 and 1 are"),
    "bool 255 in array": (kv(("a", V.ARRAY, u32(V.BOOL) + u64(2) + b"\x01\xff")), r"bool stored as 255"),
    "terminal codes": (kv(("\x1b[31m", V.UINT8, 1), ("\x1b[31m", V.UINT8, 1)), r"'\\x1b\[31m' occurs twice"),
    # Alignment.
    "alignment type": (alignment(V.UINT64, 32), r"alignment has the type UINT64; it must be UINT32"),
    "alignment string": (alignment(V.STRING, "32"), r"alignment has the type STRING"),
    "alignment bool": (alignment(V.BOOL, True), r"alignment has the type BOOL"),
    "alignment 0": (alignment(V.UINT32, 0), r"alignment is 0; it must be a power of two"),
    "alignment 33": (alignment(V.UINT32, 33), r"alignment is 33; it must be a power of two"),
    # Tensors.
    "empty name": (tensors(Tensor("")), r"tensor 0 has an empty name"),
    "name not UTF-8": (tensors(Tensor(b"\xff")), r"the name of tensor 0 is not valid UTF-8"),
    "duplicate name": (tensors(Tensor("t"), Tensor("t")), r"tensor 't' occurs twice"),
    "no dimensions": (tensors(Tensor("t", ())), r"'t' has 0 dimensions; 1 to 4 are possible"),
    "5 dimensions": (tensors(Tensor("t", (32, 1, 1, 1, 1))), r"'t' has 5 dimensions; 1 to 4"),
    "size 0": (tensors(Tensor("t", (32, 0))), r"'t' has size 0 in dimension 1"),
    "size -1": (tensors(Tensor("t", (32, -1))), r"'t' has size -1 in dimension 1"),
    "size overflow": (tensors(Tensor("t", (2**40, 2**40))), r"its size overflows 64 bits"),
    "bytes overflow": (tensors(Tensor("t", (2**62,))), r"shape \(4611686018427387904,\): its size overflows"),
    "unknown type": (
        tensors(Tensor("t", kind=200)),
        r"tensor 't' has the ggml type 200, which is unknown.*Known: 0 F32, 1 F16, 2 Q4_0.*39 MXFP4",
    ),
    "removed type": (tensors(Tensor("t", kind=4)), r"type 4, which is Q4_2, which ggml has removed"),
    "row of 33": (tensors(Tensor("t", (33,), T.Q8_0)), r"rows of 33 values; Q8_0 stores.*blocks of 32"),
    "row of 128": (tensors(Tensor("t", (128, 2), T.Q4_K)), r"rows of 128 values; Q4_K stores.*of 256"),
    "misaligned": (tensors(Tensor("t", offset=1)), r"at offset 1, not a multiple of the alignment 32"),
    "overlap": (tensors(Tensor("t"), Tensor("u", offset=32)), r"'u' is at offset 32.*before it ends at 128"),
    "same place": (tensors(Tensor("t"), Tensor("u", offset=0)), r"'u'.*they overlap or are out of order"),
    "gap": (
        tensors(Tensor("t"), Tensor("u", offset=160, data=bytes(256))),
        r"'u' is at offset 160, after a gap or out of order: it belongs at 128",
    ),
    "out of order": (
        tensors(Tensor("t", offset=128), Tensor("u", offset=0)),
        r"'t' is at offset 128, after a gap or out of order: it belongs at 0",
    ),
    "outside": (tensors(Tensor("t", offset=2**63)), r"'t' is at offset 9223372036854775808, outside the file"),
    "cut short": (tensors(Tensor("t", (256, 8)))[:-1], r"the download is cut short: 8\d{3} of 8\d{3} bytes"),
    "huge but orderly": (tensors(Tensor("t", (2**50,))), r"cut short: \d+ of 45035996273\d+ bytes"),
    "alignment beyond": (
        gguf_bytes([("general.alignment", V.UINT32, 2**31)], [Tensor("t")]),
        r"cut short: \d+ of 2147483776 bytes",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_with_its_own_words(case, tmp_path):
    content, message = HOSTILE[case]
    with pytest.raises(GGUFError, match=message) as caught:
        open_bytes(content, tmp_path)
    assert str(tmp_path / "model.gguf") in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(str(tmp_path))


@pytest.mark.parametrize("case", [case for case in HOSTILE if len(HOSTILE[case][0]) < 1000])
def test_claims_cost_neither_memory_nor_time(case, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[case][0])
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError):
            open_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert time.perf_counter() - start < 1


def test_oversized_header_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    start = kv(("a", V.ARRAY, u32(V.INT8) + u64(1 << 30)))
    with path.open("wb") as file:
        file.write(start)
        file.truncate((1 << 30) + len(start))  # sparse
    with pytest.raises(GGUFError, match=r"'a' would make the header larger than 32 MiB"):
        open_gguf(path)


VALID = gguf_bytes(
    [
        ARCHITECTURE,
        ("general.alignment", V.UINT32, 16),
        ("a", V.ARRAY, (V.STRING, ["x", "", "Ġthe"])),
        ("b", V.ARRAY, (V.BOOL, [True, False])),
        ("c", V.FLOAT64, 0.5),
    ],
    [Tensor("t", (32, 2), T.Q8_0), Tensor("u", (5,)), Tensor("v", (1, 1, 2, 2), T.F16)],
    alignment=16,
)
HEADER_BYTES = len(VALID) - (80 + 32 + 16)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Opens bytes as a file of their own: a file that is mapped must not be written again."""
    folder: Path = tmp_path_factory.mktemp("scratch")
    numbers = count()

    def survives(content: bytes) -> bool:
        """Opens the file and reads all of it; whether it was accepted. Only `GGUFError` may come."""
        name = f"{next(numbers)}.gguf"
        try:
            with open_bytes(content, folder, name) as model:
                for tensor in model.tensors:
                    assert model.blocks(tensor).nbytes == model.tensors[tensor].nbytes
                    model.blocks(tensor).max()
        except GGUFError as error:
            assert str(folder) in str(error)  # noqa: PT017
            return False
        finally:
            (folder / name).unlink()
        return True

    return survives


def test_the_unharmed_file_is_accepted(scratch):
    assert scratch(VALID)


def test_every_truncation_is_refused(scratch):
    # The last tensor is 8 bytes long and padded to 16: the padding may be absent.
    assert [size for size in range(len(VALID)) if scratch(VALID[:size])] == list(range(len(VALID) - 8, len(VALID)))


@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7F, 0x80, 0xFF])
def test_every_byte_of_the_header_replaced(scratch, byte):
    for position in range(HEADER_BYTES):
        scratch(VALID[:position] + bytes([byte]) + VALID[position + 1 :])


INTERESTING = st.sampled_from([b"\xff" * 8, u64(2**63), u64(HUGE), u64(0), u64(1 << 32), u32(9), u32(8), b"\x00"])


@given(st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 9), INTERESTING | st.binary(max_size=9))))
def test_mutations_parse_or_raise_gguf_error(scratch, edits):
    content = VALID
    for position, removed, added in edits:
        content = content[:position] + added + content[position + removed :]
    scratch(content)


@given(st.binary(max_size=200))
def test_any_bytes_after_the_counts(scratch, tail):
    scratch(b"GGUF" + u32(3) + u64(1) + u64(1) + tail)
