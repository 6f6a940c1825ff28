"""The safetensors container: equal to the library where the library is right, and strict where it is not."""

import errno
import gc
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_header import DTYPES, quoted
from lora_squeeze.formats.safetensors_io import TensorFile, TensorFileWriter, save_file

names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
metadatas = st.dictionaries(texts.filter(lambda key: key != "format"), texts, max_size=4)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
layouts = st.dictionaries(names, st.tuples(st.sampled_from(list(DTYPES.values())), shapes), min_size=1, max_size=6)
in_one_folder = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bit pattern of the dtype, NaN included."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(shape)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


def fresh(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.unlink(missing_ok=True)
    return path


def container(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


@in_one_folder
@given(layouts, metadatas, st.integers(0, 99))
def test_the_library_reads_what_is_written(tmp_path: Path, layout, metadata, seed) -> None:
    path = fresh(tmp_path)
    tensors = {name: random_tensor(*kind, seed + i) for i, (name, kind) in enumerate(layout.items())}
    with TensorFileWriter(path, layout, reserve_metadata=1000) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
        file.close(metadata)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    with safetensors.safe_open(path, "pt") as handle:
        assert handle.metadata() == {**metadata, "format": "pt"}
    with TensorFile(path) as ours:
        assert ours.metadata == {**metadata, "format": "pt"}
        assert all(same(ours.read(name), tensors[name]) for name in tensors)
        assert all(e.begin % e.dtype.itemsize == 0 for e in ours.entries.values()), "every tensor is aligned"


@in_one_folder
@given(layouts, metadatas, st.integers(0, 99))
def test_what_the_library_writes_is_read(tmp_path: Path, layout, metadata, seed) -> None:
    path = fresh(tmp_path)
    tensors = {name: random_tensor(*kind, seed + i) for i, (name, kind) in enumerate(layout.items())}
    safetensors.torch.save_file(tensors, path, metadata)
    with TensorFile(path) as file:
        assert file.entries.keys() == tensors.keys()
        assert file.metadata == metadata
        assert all(same(file.read(name), tensors[name]) for name in tensors)
        assert file.size_bytes == path.stat().st_size
        assert file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


@in_one_folder
@given(layouts, st.integers(0, 99))
def test_the_bytes_are_those_of_the_library(tmp_path: Path, layout, seed) -> None:
    tensors = {name: random_tensor(*kind, seed + i) for i, (name, kind) in enumerate(layout.items())}
    path = fresh(tmp_path)
    save_file(path, tensors, {})
    assert path.read_bytes() == safetensors.torch.save(tensors, {"format": "pt"})


def test_bytes_depend_neither_on_the_order_of_entries_nor_of_writing(tmp_path: Path) -> None:
    tensors = {f"t{i}": random_tensor(dtype, (3,), i) for i, dtype in enumerate(DTYPES.values())}
    written = []
    for i, order in enumerate([list(tensors), list(reversed(tensors))]):
        path = tmp_path / str(i)
        with TensorFileWriter(path, {n: (tensors[n].dtype, (3,)) for n in order}, 100) as file:
            for name in order:
                file.write(name, tensors[name])
            file.close({key: "v" for key in (order[0], order[-1])})
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_unused_reserve_is_padding(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with TensorFileWriter(path, {"a": (torch.float32, (2,))}, reserve_metadata=501) as file:
        file.write("a", torch.ones(2))
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert length % 8 == 0
    assert raw[8 : 8 + length].rstrip(b" ").endswith(b"}")
    assert raw[8 : 8 + length].endswith(b" " * 501)
    assert torch.equal(safetensors.torch.load_file(path)["a"], torch.ones(2))


def test_metadata_fills_its_reserve_to_the_byte(tmp_path: Path) -> None:
    metadata = {"k": "väl\n"}
    need = len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode()) - 2 + len(",")
    padding = 0
    for reserve in range(need + 1):
        path = tmp_path / str(reserve)
        file = TensorFileWriter(path, {"a": (torch.float32, (0,))}, reserve_metadata=reserve)
        file.write("a", torch.ones(0))
        try:
            file.close(metadata)
        except LoraSqueezeError as error:
            assert f"the metadata needs {need} bytes, {reserve} were reserved; reserve more" in str(error)
            assert not path.exists()
            assert reserve < need
        else:
            padding = reserve
            assert need - 8 < reserve, "less fits only thanks to the rounding to 8"
            assert TensorFile(path).metadata == {**metadata, "format": "pt"}
    assert padding == need


def test_format_is_always_pt(tmp_path: Path) -> None:
    save_file(tmp_path / "a", {"a": torch.ones(1)}, {"format": "mlx"})
    assert TensorFile(tmp_path / "a").metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(6.0).reshape(3, 2)[:, 1:].expand(3, 2),
        torch.nn.Parameter(torch.ones(3, 2)),
        torch.full((3, 2), 1 + 2j).conj().imag,
        torch.full((1,), 1 + 2j).conj().imag,
        torch.arange(8.0)[3::5],
        torch.arange(8.0)[3],
    ],
    ids=["transposed", "expanded", "parameter", "lazily negative", "lazily negative, one", "one of a stride", "scalar"],
)
def test_what_is_stored_is_the_value_not_the_memory(tmp_path: Path, tensor: torch.Tensor) -> None:
    save_file(tmp_path / "a", {"a": tensor}, {})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a")["a"], tensor.detach())


def test_reading_takes_only_the_memory_of_the_tensor(tmp_path: Path) -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    path, count = tmp_path / "big", 64
    with TensorFileWriter(path, {f"t{i}": (torch.uint8, (1 << 20,)) for i in range(count)}) as file:
        for i in range(count):
            file.write(f"t{i}", torch.full((1 << 20,), i, dtype=torch.uint8))
    before = resident_pages()
    with TensorFile(path) as big:
        peak = 0
        for i in range(count):
            assert big.read(f"t{i}")[-1] == i
            peak = max(peak, resident_pages())
        big.sha256()
        peak = max(peak, resident_pages())
    grown = (peak - before) * os.sysconf("SC_PAGE_SIZE")
    assert grown < 16 << 20, f"{grown} bytes resident for tensors of 1 MiB in a file of {count} MiB"


def test_a_replaced_path_does_not_change_what_is_read(tmp_path: Path) -> None:
    save_file(tmp_path / "a", {"a": torch.ones(4)}, {})
    save_file(tmp_path / "b", {"a": torch.zeros(4)}, {})
    with TensorFile(tmp_path / "a") as file:
        os.replace(tmp_path / "b", tmp_path / "a")
        assert torch.equal(file.read("a"), torch.ones(4))


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: pwrite(fd, view[:5], offset))
    tensor = random_tensor(torch.float64, (5, 3), 0)
    save_file(tmp_path / "a", {"a": tensor}, {"k": "v"})
    assert same(TensorFile(tmp_path / "a").read("a"), tensor)
    monkeypatch.undo()
    assert same(safetensors.torch.load_file(tmp_path / "a")["a"], tensor)


def test_a_file_shortened_while_open_is_named_with_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file(path, {"first": torch.ones(4), "last": torch.ones(4)}, {})
    with TensorFile(path) as file:
        os.truncate(path, file.size_bytes - 3)
        assert torch.equal(file.read("first"), torch.ones(4))
        with pytest.raises(LoraSqueezeError, match=r"a': tensor 'last': the file ends after 13 of 16 bytes"):
            file.read("last")


def test_closed_files_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    save_file(tmp_path / "a", {"a": torch.ones(4)}, {})
    file = TensorFile(tmp_path / "a")
    with pytest.raises(LoraSqueezeError, match="no tensor 'b' among the 1 it holds"):
        file.read("b")
    file.close()
    file.close()
    with pytest.raises(LoraSqueezeError, match="the file is closed"):
        file.read("a")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    save_file(tmp_path / "good", {"a": torch.ones(4)}, {})
    (tmp_path / "bad").write_bytes(b"{}" * 20)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    TensorFile(tmp_path / "good").read("a")
    TensorFileWriter(tmp_path / "unfinished", {"a": (torch.int8, (1,))})
    for path in ("bad", "unfinished", ".", "absent"):
        with pytest.raises(LoraSqueezeError):
            TensorFile(tmp_path / path)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


DEEP = b'{"a":' + b"[" * 100_000
PICKLE = r"this is a PyTorch pickle, not safetensors; name it \.bin"
GIVEN_TWICE = (
    b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
)
FIELD_TWICE = b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
KEY_TWICE = b'{"__metadata__":{"k":"v","k":"v"},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
HALF = b'{"a\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
HALF_VALUE = b'{"__metadata__":{"k":"\\ud800"},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
DATA = bytes(8)
MALFORMED = {
    "empty": (b"", "the file is empty; the file is damaged or incomplete: download or export it again"),
    "short": (b"\x02\0\0\0\0\0\0\0{", "the file has 9 bytes, too short"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer.*`git lfs pull`"),
    "html": (b"\n <!DOCTYPE html><html><head></head></html>", "web page saved in place of weights"),
    "html bom": (b"\xef\xbb\xbf<html>", "web page saved in place of weights"),
    "zip": (b"PK\x03\x04\x14\0\0\0\x08\0" + bytes(99), PICKLE),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", PICKLE),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(40), "this is a GGUF file"),
    "huge header": (struct.pack("<Q", 10**8 + 1) + b"{}", "header of 100000001 bytes announced, 100000000 allowed"),
    "header beyond file": (struct.pack("<Q", 99) + b"{}", "header of 99 bytes announced in a file of 10 bytes"),
    "no brace": (container(b' {"a":1}'), "the header begins with ' ' in place of '{'"),
    "terminal escape": (container(b"\x1b[31m"), r"the header begins with '\\x1b'"),
    "not json": (container(b'{"a"}'), "the header is not UTF-8 JSON"),
    "not utf-8": (container(b'{"\xff":1}'), "the header is not UTF-8 JSON"),
    "deep": (container(DEEP), "the header is not UTF-8 JSON"),
    "trailing object": (container(b"{}{}"), "the header is not UTF-8 JSON"),
    "long number": (container(b'{"a":' + b"1" * 5000 + b"}"), "the header is not UTF-8 JSON"),
    "no tensors": (container({"__metadata__": {"k": "v"}}), "the file holds no tensors"),
    "tensor twice": (container(GIVEN_TWICE), "the key 'a' occurs twice"),
    "field twice": (container(FIELD_TWICE), "the key 'dtype' occurs twice"),
    "metadata twice": (container(KEY_TWICE), "the key 'k' occurs twice"),
    "metadata list": (container({"__metadata__": [], "a": entry()}, DATA), "__metadata__ is not a JSON object"),
    "metadata number": (container({"__metadata__": {"k": 1}, "a": entry()}, DATA), "__metadata__ 'k' is '1', not"),
    "metadata half pair": (container(HALF_VALUE), "__metadata__ 'k' holds half of a surrogate pair"),
    "entry no object": (container({"a": [1]}), r"tensor 'a': described by '\[1\]'"),
    "unknown field": (container({"a": entry(extra=1)}, DATA), "tensor 'a': unknown field 'extra'"),
    "missing field": (container({"a": {"dtype": "F32", "shape": [2]}}, DATA), "'a': field 'data_offsets' is missing"),
    "unknown dtype": (container({"a": entry("F4")}, DATA), "tensor 'a': unknown dtype 'F4'; convert it to one of U64"),
    "dtype list": (container({"a": entry(["F32"])}, DATA), "tensor 'a': unknown dtype"),
    "shape bool": (container({"a": entry(shape=[True, 2])}, DATA), r"shape '\[True, 2\]' is not a list of integers"),
    "shape float": (container({"a": entry(shape=[2.0])}, DATA), r"shape '\[2.0\]' is not a list of integers"),
    "shape NaN": (container({"a": entry(shape=[float("nan")])}, DATA), r"shape '\[nan\]' is not a list of integers"),
    "shape text": (container({"a": entry(shape="2")}, DATA), "shape '2' is not a list of integers"),
    "shape null": (container({"a": entry(shape=None)}, DATA), "shape 'None' is not a list of integers"),
    "negative": (container({"a": entry(shape=[-2])}, DATA), r"tensor 'a': shape '\[-2\]' has a number below 0"),
    "two negatives": (container({"a": entry(shape=[-1, -2])}, DATA), "has a number below 0"),
    "dim too large": (container({"a": entry(shape=[2**63])}, DATA), "has a number below 0 or above"),
    "product too large": (container({"a": entry(shape=[2**40, 2**40])}, DATA), "is too large for any tensor"),
    "wraps to 8 bytes": (container({"a": entry(shape=[2**62 + 1, 4, 2])}, DATA), "is too large for any tensor"),
    "empty but absurd": (container({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}), "is too large for any"),
    "many dims": (container({"a": entry(shape=[1] * 65 + [2])}, DATA), "is too large for any tensor"),
    "one offset": (container({"a": entry(offsets=[8])}, DATA), r"data_offsets '\[8\]' is not a pair"),
    "offset float": (container({"a": entry(offsets=[0, 8.0])}, DATA), r"data_offsets '\[0, 8.0\]' is not a list"),
    "backwards": (container({"a": entry(offsets=[8, 0])}, DATA), r"data_offsets \[8, 0\] end before they begin"),
    "beyond": (container({"a": entry()}, DATA[:-1]), r"tensor 'a': data_offsets \[0, 8\] reach beyond the 7 bytes"),
    "mismatch": (container({"a": entry(shape=[3])}, DATA), r"F32 of shape \[3\] takes 12 bytes, data_offsets give 8"),
    "overlap": (
        container({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        "tensor 'b': its data overlaps by 4 bytes with tensor 'a'",
    ),
    "shared": (container({"a": entry(), "b": entry()}, DATA), "tensor 'b': its data overlaps by 8 bytes"),
    "hole": (
        container({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
        "tensor 'b': a hole of 4 bytes between it and tensor 'a'",
    ),
    "hole in front": (container({"a": entry(offsets=[1, 9])}, bytes(9)), "a hole of 1 bytes between it and the header"),
    "trailing": (container({"a": entry()}, bytes(11)), "3 bytes follow the last tensor"),
    "name NUL": (container({"a\0b": entry()}, DATA), r"tensor 'a\\x00b': '\\x00' in its name"),
    "name escape": (container({"\x1b]0;x\x07": entry()}, DATA), r"tensor '\\x1b\]0;x\\x07': '\\x1b' in its name"),
    "name C1": (container({"a\x9b31m": entry()}, DATA), r"'\\x9b' in its name"),
    "name half pair": (container(HALF), r"'\\ud800' in its name"),
    "name empty": (container({"": entry()}, DATA), "tensor '': an empty name; rename the tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    raw, message = MALFORMED[case]
    path = tmp_path / "weights\x1b[2J.safetensors"
    path.write_bytes(raw)
    with pytest.raises(LoraSqueezeError, match=message) as caught:
        TensorFile(path)
    assert str(caught.value).startswith(f"{quoted(path)}: "), "the message begins with the file"
    assert str(caught.value).isprintable(), "no control character reaches the terminal"


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for reserve in range(0, 1600, 8):
        path.unlink(missing_ok=True)
        with TensorFileWriter(path, {"a": (torch.int8, (1,))}, reserve) as file:
            file.write("a", torch.ones(1, dtype=torch.int8))
        raw = path.read_bytes()
        if raw[:2] == b"\x80\x02":
            break
    assert raw[:2] == b"\x80\x02", "a length of 640 begins as a pickle does"
    assert list(TensorFile(path).entries) == ["a"]


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda raw: container(b"{" + raw)))
@in_one_folder
def test_random_bytes_are_refused_by_our_error_only(tmp_path: Path, raw: bytes) -> None:
    path = fresh(tmp_path)
    path.write_bytes(raw)
    with pytest.raises(LoraSqueezeError):
        TensorFile(path)


def test_long_names_are_cut_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(container({"n" * 10_000: entry("F4")}, DATA))
    with pytest.raises(LoraSqueezeError, match="unknown dtype") as caught:
        TensorFile(path)
    assert len(str(caught.value)) < 500
    assert "'" + "n" * 120 + "...'" in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "absent", "NUL in path", "dangling"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    expected = {"pipe": "a pipe", "folder": "a folder", "device": "a device", "NUL in path": "null"}
    if kind == "pipe":
        os.mkfifo(path)  # opening it for reading waits for a writer
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "NUL in path":
        path = tmp_path / "a\0"
    elif kind == "dangling":
        path.symlink_to("nowhere")
    with pytest.raises(LoraSqueezeError, match=expected.get(kind, "cannot be opened: No such file")):
        TensorFile(path)


def test_a_pipe_that_takes_the_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    save_file(tmp_path / "file", {"a": torch.ones(1)}, {})
    os.mkfifo(tmp_path / "pipe")
    regular = os.stat(tmp_path / "file")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(LoraSqueezeError, match="a pipe"):
        patch.setattr(os, "stat", lambda _: regular)
        TensorFile(tmp_path / "pipe")


def one(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"a": (dtype, shape)}


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("b", torch.ones(2), "tensor 'b': not announced"),
        ("a", torch.ones(3), r"announced as torch.float32 \[2\], got torch.float32 \[3\]"),
        ("a", torch.ones(2).half(), r"announced as torch.float32 \[2\], got torch.float16 \[2\]"),
        ("a", torch.ones(2).to_sparse(), "holds no dense data"),
        ("a", torch.ones(2, device="meta"), "on meta holds no dense data"),
    ],
)
def test_writing_what_was_not_announced_is_refused_and_leaves_no_file(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(LoraSqueezeError, match=message), TensorFileWriter(tmp_path / "a", one()) as file:
        file.write(name, tensor)
    assert os.listdir(tmp_path) == []


def test_each_tensor_is_written_once_and_before_closing(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "a", one()) as file:
        file.write("a", torch.ones(2))
        with pytest.raises(LoraSqueezeError, match="tensor 'a': written already"):
            file.write("a", torch.zeros(2))
        file.close()
        with pytest.raises(LoraSqueezeError, match="the file is closed"):
            file.write("a", torch.zeros(2))
    assert torch.equal(TensorFile(tmp_path / "a").read("a"), torch.ones(2))


def test_a_missing_tensor_or_bad_metadata_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(LoraSqueezeError, match="1 of 1 tensors were not written, the first is 'a'"):
        TensorFileWriter(tmp_path / "a", one()).close()
    with (
        pytest.raises(LoraSqueezeError, match="metadata 'k' is not text"),
        TensorFileWriter(tmp_path / "a", one(), reserve_metadata=100) as file,
    ):
        file.write("a", torch.ones(2))
        file.close({"k": "\ud800"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "no tensors to write"),
        ({"": (torch.float32, (1,))}, "an empty name"),
        ({"a\n": (torch.float32, (1,))}, r"tensor 'a\\n': '\\n' in its name"),
        ({"__metadata__": (torch.float32, (1,))}, "a reserved name"),
        ({"a": (torch.complex64, (1,))}, "torch.complex64 cannot be stored; convert it to one of"),
    ],
    ids=["none", "empty name", "newline", "reserved", "complex"],
)
def test_entries_that_cannot_be_stored_are_refused_before_a_file_is_made(tmp_path: Path, entries, message) -> None:
    with pytest.raises(LoraSqueezeError, match=message):
        TensorFileWriter(tmp_path / "a", entries)
    assert os.listdir(tmp_path) == []


def test_a_header_that_no_reader_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraSqueezeError, match=r"need a header of .* bytes, 100000000 allowed"):
        TensorFileWriter(tmp_path / "a", one(), reserve_metadata=10**8)
    assert os.listdir(tmp_path) == []


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(LoraSqueezeError, match="cannot be written: File exists"):
        TensorFileWriter(tmp_path / "a", one())
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_is_reported_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(LoraSqueezeError, match="a': cannot be written: No space left on device"):
        save_file(tmp_path / "a", {"a": torch.ones(2)}, {})
    assert os.listdir(tmp_path) == []


def test_the_umask_decides_the_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_file(tmp_path / "a", {"a": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
