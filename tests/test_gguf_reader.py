# SPDX-License-Identifier: Apache-2.0
"""The GGUF reader on well-formed files: agreement with gguf-py, split sets, directories, errors, speed."""

import math
import mmap
import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import ARCHITECTURE, SCALAR_FORMATS, T, Tensor, V, data_bytes, gguf_bytes, open_bytes, split_set
from hypothesis import given
from hypothesis import strategies as st

from ktx_jax.gguf.architecture import check_architecture
from ktx_jax.gguf.reader import GGUFError, open_gguf

# --- agreement with gguf-py -------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NAMES = TEXT.filter(lambda text: text and not text.startswith(("GGUF.", "general.", "split.")))
SCALARS = {
    V.FLOAT32: st.floats(width=32, allow_nan=False),
    V.FLOAT64: st.floats(allow_nan=False),
    V.BOOL: st.booleans(),
    V.STRING: TEXT,
} | {
    kind: st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    for kind, dtype in gguf.GGUFReader.gguf_scalar_to_np.items()
    if np.issubdtype(dtype, np.integer)
}
KINDS = st.sampled_from([*SCALAR_FORMATS, V.STRING])
VALUES = KINDS.flatmap(
    lambda kind: (
        st.tuples(st.just(kind), SCALARS[kind])
        | st.tuples(st.just(V.ARRAY), st.tuples(st.just(kind), st.lists(SCALARS[kind], max_size=5)))
    )
)


@st.composite
def tensor_tables(draw):
    table = []
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        kind = draw(st.sampled_from(sorted(gguf.GGML_QUANT_SIZES)))
        block_size = gguf.GGML_QUANT_SIZES[kind][0]
        row = block_size * draw(st.integers(1, 3))
        tensor = Tensor(name, (row, *draw(st.lists(st.integers(1, 3), max_size=3))), kind)
        seed = draw(st.integers(0, 2**32 - 1))
        data = np.random.default_rng(seed).bytes(data_bytes(tensor))
        table.append(Tensor(name, tensor.dims, kind, data=data))
    return table


@pytest.fixture(scope="module")
def fresh_file(tmp_path_factory):
    """Paths never used before: a file that is mapped must not be written again."""
    folder, numbers = tmp_path_factory.mktemp("files"), count()
    return lambda: folder / f"{next(numbers)}.gguf"


@given(
    st.dictionaries(NAMES, VALUES, max_size=6),
    tensor_tables(),
    st.sampled_from([2, 3]),
    st.sampled_from([None, 8, 16, 64, 4096]),
)
def test_any_valid_file_reads_as_gguf_py_reads_it(fresh_file, entries, table, version, alignment):
    metadata = [(key, *value) for key, value in entries.items()]
    if alignment:
        metadata.append(("general.alignment", V.UINT32, alignment))
    path = fresh_file()
    path.write_bytes(gguf_bytes(metadata, table, version=version, alignment=alignment or 32))
    assert_same_as_gguf_py(path)
    with open_gguf(path) as model:
        for key, (kind, value) in entries.items():
            assert model.metadata[key] == (value[1] if kind == V.ARRAY else value)
        for tensor in table:
            assert model.blocks(str(tensor.name)).tobytes() == tensor.data


def assert_same_as_gguf_py(path):
    theirs = gguf.GGUFReader(path)
    with open_gguf(path) as ours:
        fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields)
        for key, field in fields.items():
            assert ours.metadata[key] == field.contents()
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            assert_same_tensor(ours, tensor)


def assert_same_tensor(ours, tensor):
    info, blocks = ours.tensors[tensor.name], ours.blocks(tensor.name)
    block_size, type_size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    assert info.ggml_type is tensor.tensor_type
    assert info.shape == tuple(reversed(tensor.shape.tolist()))
    assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
    assert blocks.shape == (*info.shape[:-1], info.shape[-1] // block_size, type_size)
    assert np.array_equal(blocks.reshape(-1), tensor.data.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("file", ["mini/f16", "mini/q4_k_m", "legacy/q8_0", "minigroup/q8_0"])
def test_reference_models_read_as_gguf_py_reads_them(oracle, file):
    assert_same_as_gguf_py(oracle / f"{file}.gguf")


# --- one file ---------------------------------------------------------------------------------------------


def test_blocks_are_read_only_views_that_outlive_the_model(tmp_path):
    data = bytes(range(68))
    model = open_bytes(gguf_bytes(tensors=[Tensor("t", (32, 2), T.Q8_0, data=data)]), tmp_path)
    blocks = model.blocks("t")
    assert blocks.shape == (2, 1, 34)
    assert not blocks.flags.writeable
    assert not blocks.flags.owndata
    model.close()
    model.close()
    assert blocks.tobytes() == data
    with pytest.raises(ValueError, match=r"model\.gguf is closed"):
        model.blocks("t")


@pytest.mark.parametrize(
    ("kind", "dims", "shape"),
    [(T.F32, (5,), (5, 4)), (T.BF16, (5, 2), (2, 5, 2)), (T.Q4_K, (512, 3, 2), (2, 3, 2, 144))],
)
def test_blocks_shape(tmp_path, kind, dims, shape):
    model = open_bytes(gguf_bytes(tensors=[Tensor("t", dims, kind)]), tmp_path)
    assert model.blocks("t").shape == shape


def test_absent_padding_after_the_last_tensor_is_allowed(tmp_path):
    content = gguf_bytes(tensors=[Tensor("t", (3,), data=b"\1" * 12)])
    model = open_bytes(content[: len(content) - 20], tmp_path)
    assert model.blocks("t").tobytes() == b"\1" * 12


def test_mappings_cannot_be_changed(tmp_path):
    model = open_bytes(gguf_bytes(tensors=[Tensor("t")]), tmp_path)
    for mapping in (model.metadata, model.tensors):
        with pytest.raises(TypeError):
            mapping["t"] = None


def resident(array):
    """Bytes of the mapping that holds `array` that this process has resident."""
    address, inside = array.__array_interface__["data"][0], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field = line.split()
        if "-" in field[0] and not field[0].endswith(":"):
            low, high = (int(part, 16) for part in field[0].split("-"))
            inside = low <= address < high
        elif inside and field[0] == "Rss:":
            return int(field[1]) << 10
    raise AssertionError("no such mapping")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_release_drops_resident_pages_and_keeps_the_bytes(tmp_path):
    nbytes = 8 << 20
    data = np.random.default_rng(0).bytes(nbytes)
    table = [Tensor("small", (3,)), Tensor("large", (nbytes,), T.I8, data=data)]
    with open_bytes(gguf_bytes(tensors=table), tmp_path) as model:
        blocks = model.blocks("large")
        blocks.max()
        before = resident(blocks)
        model.release("large")
        model.release("small")  # less than a page: nothing to give up
        assert before >= nbytes
        assert resident(blocks) <= before - nbytes + 2 * mmap.PAGESIZE
        assert blocks.tobytes() == data


def test_release_without_madvise_does_nothing(tmp_path, monkeypatch):
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    with open_bytes(gguf_bytes(tensors=[Tensor("t", (1 << 16,))]), tmp_path) as model:
        model.release("t")


# --- what is at the path ----------------------------------------------------------------------------------


def test_directory_with_one_model(tmp_path):
    open_bytes(gguf_bytes(tensors=[Tensor("t")]), tmp_path)
    (tmp_path / "._model.gguf").write_bytes(b"what macOS leaves behind")
    (tmp_path / "README.md").write_text("not a model")
    model = open_gguf(tmp_path)
    assert model.files == (tmp_path / "model.gguf",)
    assert model.path == tmp_path


def test_path_as_text(tmp_path):
    open_bytes(gguf_bytes(), tmp_path)
    assert open_gguf(str(tmp_path)).metadata["general.architecture"] == "deepseek2"


def test_directory_with_several_models_lists_them(tmp_path):
    split_set(tmp_path, stem="a")
    split_set(tmp_path, counts=(1, 1), stem="a")
    open_bytes(gguf_bytes(), tmp_path, "mmproj.gguf")
    with pytest.raises(GGUFError, match=r"3 models.*a-00001-of-00002.*a-00001-of-00003.*mmproj\.gguf"):
        open_gguf(tmp_path)
    assert len(open_gguf(tmp_path / "a-00002-of-00003.gguf").files) == 3


def test_directory_without_gguf(tmp_path):
    with pytest.raises(GGUFError, match=r"no \.gguf file in this folder: give"):
        open_gguf(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(GGUFError, match=r"no \.gguf file in this folder, but other weights: get the model as"):
        open_gguf(tmp_path)
    (tmp_path / "Q4_K_M").mkdir()
    (tmp_path / "Q4_K_M" / "m.gguf").touch()
    with pytest.raises(GGUFError, match=r"but in these inside it, give one: Q4_K_M"):
        open_gguf(tmp_path)


def test_path_that_does_not_exist(tmp_path):
    open_bytes(gguf_bytes(), tmp_path, "near.gguf")
    with pytest.raises(GGUFError, match=r"far\.gguf: no such file.*nothing is downloaded.*it holds near\.gguf"):
        open_gguf(tmp_path / "far.gguf")
    with pytest.raises(GGUFError, match=r"no such file or folder"):
        open_gguf(tmp_path / "deepseek-ai" / "DeepSeek-V2-Lite")
    with pytest.raises(GGUFError, match=r"cannot be read: File name too long|no such file"):
        open_gguf("x" * 5000)


def test_link_to_nothing(tmp_path):
    (tmp_path / "m.gguf").symlink_to(tmp_path / "blob")
    with pytest.raises(GGUFError, match=r"a link to .*blob, which is not there: finish the download"):
        open_gguf(tmp_path / "m.gguf")


def test_links_keep_their_names(tmp_path):
    """The Hugging Face cache holds parts as links with their names to blobs without."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(split_set(tmp_path)):
        blob = file.rename(tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / file.name).symlink_to(blob)
    assert len(open_gguf(tmp_path / "snapshot").tensors) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="no such thing there")
def test_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(GGUFError, match=r"neither a file nor a folder"):
        open_gguf(tmp_path / "m.gguf")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes())

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(GGUFError, match=r"m\.gguf: cannot be read: Permission denied"):
        open_gguf(path)


# --- split sets -------------------------------------------------------------------------------------------


def test_split_set_from_any_part_or_the_folder(tmp_path):
    files = split_set(tmp_path)
    for path in (tmp_path, *files):
        with open_gguf(path) as model:
            assert model.files == tuple(files)
            assert list(model.tensors) == ["t0", "t1", "t2", "t3", "t4"]
            assert [model.blocks(f"t{i}")[0, 0] for i in range(5)] == list(range(5))
            assert model.tensors["t3"].file == files[2]
            assert model.metadata["general.architecture"] == "deepseek2"


def test_reference_split_set_holds_the_whole_model(oracle):
    whole = open_gguf(oracle / "mini" / "q8_0.gguf")
    split = open_gguf(oracle / "split")
    assert sorted(split.tensors) == sorted(whole.tensors)
    for name in whole.tensors:
        assert np.array_equal(split.blocks(name), whole.blocks(name))


def test_set_of_one(tmp_path):
    split_set(tmp_path, counts=(2,))
    assert len(open_gguf(tmp_path).tensors) == 2


def test_missing_parts(tmp_path):
    files = split_set(tmp_path, counts=(1, 1, 1, 1, 1), stem="NAME")
    files[1].unlink()
    for path in (tmp_path, files[3]):
        with pytest.raises(GGUFError, match=r"^part 2 of 5 is missing: NAME-00002-of-00005\.gguf \(looked in /"):
            open_gguf(path)
    files[4].unlink()
    with pytest.raises(GGUFError, match=r"^parts 2, 5 of 5 are missing: NAME-00002-.*, NAME-00005-of-00005"):
        open_gguf(tmp_path)


def test_claimed_part_numbers_are_bounded(tmp_path):
    open_bytes_at = tmp_path / "m-00001-of-99999.gguf"
    open_bytes_at.write_bytes(gguf_bytes())
    with pytest.raises(GGUFError, match=r"^parts 2, 3, .* and 99990 more of 99999 are missing") as caught:
        open_gguf(open_bytes_at)
    assert len(str(caught.value)) < 1000
    (tmp_path / "m-00004-of-00003.gguf").write_bytes(gguf_bytes())
    with pytest.raises(GGUFError, match=r"the name says part 4 of 3, which cannot be"):
        open_gguf(tmp_path / "m-00004-of-00003.gguf")


def part(number, total, claimed, names, **changed):
    """The bytes of one part with these tensors; `changed` replaces or (None) removes a split key."""
    values = {"no": number, "count": total, "tensors_count": claimed} | changed
    keys = {"no": ("split.no", V.UINT16), "count": ("split.count", V.UINT16)}
    keys["tensors_count"] = ("split.tensors.count", V.INT32)
    metadata = [(*keys[key], value) for key, value in values.items() if value is not None]
    return gguf_bytes(metadata, [Tensor(name) for name in names])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (part(0, 2, 2, "a"), part(0, 2, 2, "a"), r"00002-of-.*says part 2, but by its split.no it is part 1 of 2"),
        (part(1, 2, 2, "a"), part(0, 2, 2, "b"), r"00001-of-.*says part 1, but by its split.no it is part 2 of 2"),
        (part(0, 3, 2, "a"), part(1, 3, 2, "b"), r"says one of 2 parts, but split.count is 3"),
        (part(0, 2, 3, "a"), part(1, 2, 3, "b"), r"2 parts hold 2 tensors, but split.tensors.count is 3"),
        (part(0, 2, 2, "a"), part(1, 2, 2, "a"), r"00002-of-.*'a' is in m-00001-of-00002.gguf too: a part is"),
        (part(0, 2, 2, "a"), part(1, 2, 9, "b"), r"is 9, but 2 in m-00001.*: the files are parts of different"),
        (part(0, 2, 2, "a", no=None), part(1, 2, 2, "b"), r"part 1 of 2, but split.no is not set"),
        (part(0, 2, 2, "a"), part(1, 2, 2, "b", no=None), r"part 2 of 2, but split.no is not set"),
        (part(0, 2, 2, "a", count=None), part(1, 2, 2, "b"), r"part 1 of 2, but split.count is not set"),
        (
            part(0, 2, 2, "a", tensors_count=None),
            part(1, 2, 2, "b", tensors_count=None),
            r"split.tensors.count is not set in the first of 2 parts",
        ),
        (part(0, 2, -1, "a"), part(1, 2, 2, "b"), r"split.tensors.count is '-1'; it must be a whole number"),
        (part(0, 2, 2, "a"), part(1, 2, 2, "b")[:-1], r"00002-of-00002.gguf: the download is cut short: 287 of 288"),
        (part(0, 2, 2, "a"), b"", r"00002-of-00002.gguf: the file is empty"),
    ],
)
def test_inconsistent_set(tmp_path, first, second, message):
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(first)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(second)
    with pytest.raises(GGUFError, match=message):
        open_gguf(tmp_path)


def test_later_parts_need_only_their_number(tmp_path):
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(part(0, 2, 2, "a"))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(part(1, 2, 2, "b", count=None, tensors_count=None))
    assert len(open_gguf(tmp_path).tensors) == 2


def test_part_under_another_name(tmp_path):
    shutil.move(split_set(tmp_path)[1], tmp_path / "second.gguf")
    with pytest.raises(GGUFError, match=r"this is part 2 of 3 of a split.*not end in -00002-of-00003\.gguf"):
        open_gguf(tmp_path / "second.gguf")


# --- missing tensors and other architectures --------------------------------------------------------------


def missing(model, name="token_embd.weight"):
    with pytest.raises(GGUFError) as caught:
        model.blocks(name)
    return str(caught.value)


def test_missing_tensor_says_what_was_read(tmp_path):
    split_set(tmp_path)
    message = missing(open_gguf(tmp_path))
    assert "tensor 'token_embd.weight' is missing" in message
    assert "all 3 parts, m-00001-of-00003.gguf to m-00003-of-00003.gguf" in message
    assert "5 tensors; none is cut short" in message
    assert "the wrong folder" in message


def test_missing_tensor_names_its_likely_cause(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    model = open_bytes(gguf_bytes(tensors=[Tensor("token_embed.weight")]), other, "a.gguf")
    (other / "b.gguf").touch()
    message = missing(model)
    assert "Similar names there: 'token_embed.weight'" in message
    assert "Not read, in the same folder: b.gguf" in message
    assert "vocabulary or metadata only" in missing(open_bytes(gguf_bytes(), tmp_path))
    lora = [Tensor("blk.0.attn_q.weight.lora_a")]
    assert "LoRA adapter: give the base" in missing(open_bytes(gguf_bytes(tensors=lora), tmp_path, "lora.gguf"))
    mmproj = gguf_bytes([("general.type", V.STRING, "mmproj")], [Tensor("v.blk.0")])
    assert "of the type 'mmproj'" in missing(open_bytes(mmproj, tmp_path, "mmproj.gguf"))


@pytest.mark.parametrize(
    ("architecture", "content", "message"),
    [
        ("llama", None, r"the architecture is 'llama'; supported: deepseek2 \(DeepSeek-V2, V2\.5"),
        ("deepseek", None, r"the architecture is 'deepseek'; supported"),
        ("clip", None, r"a vision or audio projector, not a language model"),
        ("deepseek2", "mmproj", r"a vision or audio projector, not a language model"),
        ("deepseek2", "adapter", r"an adapter \(LoRA\), not a language model"),
        ("deepseek2", "strange", r"of the type 'strange', not a language model"),
        (None, None, r"general\.architecture is not set; supported"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, architecture, content, message):
    values = {"general.architecture": architecture, "general.type": content}
    metadata = [(key, V.STRING, value) for key, value in values.items() if value]
    model = open_bytes(gguf_bytes(metadata), tmp_path)
    with pytest.raises(GGUFError, match=message):
        check_architecture(model)


@pytest.mark.parametrize("extra", [[], [("general.type", V.STRING, "model")]])
def test_deepseek2_is_accepted(tmp_path, extra):
    check_architecture(open_bytes(gguf_bytes([ARCHITECTURE, *extra]), tmp_path))


def test_vocabulary_of_another_architecture_opens(oracle):
    model = open_gguf(oracle / "vocab" / "ggml-vocab-deepseek-llm.gguf")
    assert len(model.metadata["tokenizer.ggml.tokens"]) == 102_400
    with pytest.raises(GGUFError, match="'llama'"):
        check_architecture(model)


# --- speed ------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys, time
from ktx_jax.gguf.reader import open_gguf
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, seconds = peak(), []
for _ in range(3):
    start = time.perf_counter()
    model = open_gguf(sys.argv[1])
    seconds.append(time.perf_counter() - start)
assert len(model.metadata["tokens"]) == 102_400
print(min(seconds), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files, ru_maxrss in KiB")
def test_ten_gigabytes_open_within_a_second_and_200_mb(tmp_path):
    tokens = [f"Ġ{i:x}的" for i in range(102_400)]
    metadata = [
        ("tokens", V.ARRAY, (V.STRING, tokens)),
        ("types", V.ARRAY, (V.INT32, [1] * len(tokens))),
        ("merges", V.ARRAY, (V.STRING, [f"Ġ{i:x} {i:x}" for i in range(100_000)])),
    ]
    table = [Tensor(f"blk.{i}.weight", (1 << 20, 10), T.I8, offset=i * 10 << 20, data=b"") for i in range(959)]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(metadata, table))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + math.prod((959, 10, 1 << 20)))  # sparse
    assert path.stat().st_size > 10e9
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    seconds, megabytes = map(float, result.stdout.split())
    assert seconds < 1
    assert megabytes < 200
