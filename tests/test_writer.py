# SPDX-License-Identifier: Apache-2.0
"""Files we write are read by gguf-py and by our own reader, and a failed write leaves nothing behind."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader

from ktx_jax.errors import KtxError
from ktx_jax.gguf.quantize import quantize
from ktx_jax.gguf.reader import open_gguf
from ktx_jax.gguf.writer import TensorSource, tensor_nbytes, write_gguf

METADATA = {
    "general.architecture": "deepseek2",
    "a.bool": True,
    "a.uint32": 7,
    "a.int32": -7,
    "a.uint64": 1 << 40,
    "a.int64": -(1 << 40),
    "a.float": 0.5,
    "a.uint16": np.uint16(3),
    "a.float64": np.float64(1 / 3),
    "a.strings": ["ä", "", "b"],
    "a.ints": [1, -2, 3],
    "a.floats": [1.0, 2.5],
    "a.bools": [True, False],
    "a.empty": [],
}


def sources() -> list[TensorSource]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 512), np.float32)
    pieces = quantize(x, T.Q6_K).reshape(-1, 210)
    return [
        TensorSource("whole", (3, 5, 512), T.Q4_K, quantize(x, T.Q4_K)),
        TensorSource("vector", (9,), T.F32, quantize(rng.standard_normal(9, np.float32), T.F32)),
        TensorSource("pieces", (3, 5, 512), T.Q6_K, lambda: (pieces[i : i + 7] for i in range(0, 30, 7))),
    ]


def test_read_back_by_gguf_py(tmp_path):
    path = tmp_path / "a.gguf"
    assert write_gguf(path, METADATA, sources()) == path.stat().st_size
    reader = GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert fields == METADATA
    types = {k: [t.name for t in f.types] for k, f in reader.fields.items()}
    assert types["a.uint32"] == ["UINT32"]
    assert types["a.int64"] == ["INT64"]
    assert types["a.uint16"] == ["UINT16"]
    assert types["a.ints"] == ["ARRAY", "INT32"]
    for got, want in zip(reader.tensors, sources(), strict=True):
        pieces = list(want.blocks()) if callable(want.blocks) else [want.blocks]
        raw = np.concatenate([p.ravel() for p in pieces])
        assert (got.name, got.tensor_type) == (want.name, want.ggml_type)
        assert tuple(reversed(got.shape)) == want.shape
        np.testing.assert_array_equal(got.data.view(np.uint8).ravel(), raw)


def test_read_back_by_our_reader(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, METADATA, sources())
    with open_gguf(path) as gguf:
        assert dict(gguf.metadata) == METADATA
        whole = sources()[0]
        assert gguf.tensors["whole"].shape == whole.shape
        np.testing.assert_array_equal(gguf.blocks("whole"), whole.blocks)


def test_progress_counts_bytes(tmp_path):
    seen = []
    write_gguf(tmp_path / "a.gguf", {}, sources(), lambda done, total: seen.append((done, total)))
    total = sum(tensor_nbytes(s.shape, s.ggml_type) for s in sources())
    assert seen[-1] == (total, total)
    assert len(seen) == 1 + 1 + 5
    assert seen == sorted(seen)


def blocks(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([TensorSource("t", (2, 32), T.Q8_0, blocks(1, 1, 34))], r"t \(2, 32\) Q8_0 is 68 bytes; .* are 34"),
        ([TensorSource("t", (2, 32), T.Q8_0, blocks(3, 1, 34))], "are more than 68"),
        ([TensorSource("t", (2, 32), T.Q8_0, np.zeros(68, np.int8))], r"raw bytes \(uint8\), not int8"),
        ([TensorSource("t", (2, 33), T.Q8_0, blocks(1))], "a multiple of 32"),
        ([TensorSource("t", (1,), T.F32, blocks(4))] * 2, "given twice: t"),
        ([TensorSource("t", (10**9, 32000), T.Q8_0, blocks(1))], "takes 34000.00 GB; .* GB free"),
    ],
)
def test_a_failed_write_leaves_nothing(tmp_path, tensors, message):
    (tmp_path / "a.gguf").write_text("before")
    with pytest.raises(KtxError, match=message):
        write_gguf(tmp_path / "a.gguf", {}, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    assert (tmp_path / "a.gguf").read_text() == "before"


@pytest.mark.parametrize("value", [None, {}, [1, "a"], 1 << 70, [[1]], 1e300], ids=str)
def test_metadata_that_gguf_cannot_hold_is_named(tmp_path, value):
    with pytest.raises(KtxError, match=r"metadata some\.key: GGUF cannot hold"):
        write_gguf(tmp_path / "a.gguf", {"some.key": value}, [])


def test_bad_paths(tmp_path):
    with pytest.raises(KtxError, match="is a directory; give the name of the file"):
        write_gguf(tmp_path, {}, [])
    with pytest.raises(KtxError, match="nowhere does not exist"):
        write_gguf(tmp_path / "nowhere" / "a.gguf", {}, [])
