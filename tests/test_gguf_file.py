"""The GGUF container: damaged and hostile files are refused in one sentence, quickly, and told from other files."""

import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
import torch
from factor_cases import quick
from folder_cases import in_child, tree
from gguf import GGMLQuantizationType as Kind
from gguf_cases import ALPHA, read_gguf, write_gguf
from hypothesis import given
from hypothesis import strategies as st

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import gguf_lora
from lora_squeeze.formats.gguf_file import Field, GgufFile
from lora_squeeze.formats.gguf_file import write_gguf as write_container
from lora_squeeze.formats.single_file import replace_file

ARRAY, STRING, UINT32 = 9, 8, 4


@pytest.fixture(autouse=True)
def _never_hangs() -> Iterator[None]:
    signal.alarm(20)
    yield
    signal.alarm(0)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def container(fields: bytes = b"", count: int = 0, infos: bytes = b"", tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + fields + infos


def info(name: str, shape: tuple[int, ...], code: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, code, offset)


def array(item: int, count: int, data: bytes = b"") -> bytes:
    return text("x") + struct.pack("<IIQ", ARRAY, item, count) + data


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", UINT32, value)


ONE = info("a", (4,))
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file: it begins with ''"),
    "other": (b"GGML" + bytes(40), "not a GGUF file: it begins with 'GGML' in place of 'GGUF'"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "page": (b"<!doctype html>", "web page"),
    "old": (container(version=1), "GGUF version 1; versions 2 and 3 are read"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian; convert it with gguf-convert-endian"),
    "short": (b"GGUF\x03\0\0\0\0", "the number of tensors takes 8 bytes, the file has 1 left"),
    "array bomb": (container(array(UINT32, 2**60), 1), f"field 'x' takes {2**62} bytes, the file has 0 left"),
    "bomb of texts": (container(array(STRING, 2**60), 1), "field 'x' takes 8 bytes, the file has 0 left"),
    "nested arrays": (container(array(ARRAY, 2**60), 1), "an array of the type 9, which GGUF does not have"),
    "many fields": (container(count=2**63), "the name of a field takes 8 bytes, the file has 0 left"),
    "many tensors": (container(tensors=2**63), "the name of a tensor takes 8 bytes, the file has 0 left"),
    "long name": (container(struct.pack("<Q", 2**63), 1), f"the name of a field takes {2**63} bytes"),
    "unknown type": (container(text("x") + struct.pack("<I", 77), 1), "field 'x' has the type 77"),
    "twice": (container(number("x", 1) * 2, 2), "the field 'x' occurs twice"),
    "no UTF-8": (container(struct.pack("<Q", 1) + b"\xff" + bytes(8), 1), "the name of a field is not UTF-8"),
    "alignment": (container(number("general.alignment", 48), 1), "general.alignment is 48, not a power of two"),
    "no alignment": (container(number("general.alignment", 0), 1), "general.alignment is 0, not a power of two"),
    "wide alignment": (container(number("general.alignment", 2**31), 1), "not a power of two up to 65536"),
    "tensor twice": (container(infos=ONE * 2, tensors=2), "the tensor 'a' occurs twice"),
    "terminal escape": (container(infos=info("a\x1b[2J", (4,)), tensors=1), "in its name; rename the tensor"),
    "no dimension": (container(infos=info("a", ()), tensors=1), "tensor 'a' has 0 dimensions, 1 to 4 are possible"),
    "q4_k": (
        container(infos=info("a", (256,), 12), tensors=1),
        "tensor 'a' has the ggml type 12; f32, f16, bf16, q8_0",
    ),
    "broken blocks": (container(infos=info("a", (33,), 8), tensors=1), "q8_0 with rows of 33, no multiple of 32"),
    "elsewhere": (container(infos=info("a", (4,), 0, 32), tensors=1) + bytes(80), "tensor 'a' is at 32, expected at 0"),
    "huge": (container(infos=info("a", (2**63, 2**63)), tensors=1), "bytes of the file"),
    "cut": (container(infos=ONE, tensors=1) + bytes(8), "tensor 'a' ends at 80 of the 65 bytes of the file"),
    "rest": (container(infos=ONE, tensors=1) + bytes(100), "bytes follow the last tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_or_hostile_file_is_refused_with_what_was_found(tmp_path: Path, case: str) -> None:
    data, expected = BAD[case]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(LoraSqueezeError) as error:
        gguf_lora.load(path)
    message = str(error.value)
    assert expected in message and message.startswith(f"'{path}': ")
    assert message.isprintable() and len(message) < 500


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, expected in (
        (tmp_path, "a folder"),
        (tmp_path / "pipe.gguf", "a pipe"),
        (tmp_path / "no", "No such file"),
    ):
        with pytest.raises(LoraSqueezeError, match=expected):
            gguf_lora.load(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "good.gguf").read_bytes()


@quick
@given(data=st.data())
def test_any_change_of_the_header_is_refused_or_is_another_adapter(
    good: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never another exception, and never more memory or time than the file itself has bytes."""
    path = tmp_path_factory.mktemp("fuzz") / "a.gguf"
    at = data.draw(st.integers(0, 1400))
    change = data.draw(st.binary(min_size=1, max_size=8))
    cut = data.draw(st.integers(0, len(good)))
    path.write_bytes((good[:at] + change + good[at + len(change) :])[: None if cut % 2 else cut])
    try:
        adapter = gguf_lora.load(path)
        adapter.squeeze(rank=1).save(path.with_name("out.gguf"))
    except LoraSqueezeError as error:
        assert str(error).isprintable()
    else:
        gguf.GGUFReader(path.with_name("out.gguf"))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0], ids=lambda k: k.name)
def test_numbers_are_those_that_the_gguf_package_reads(tmp_path: Path, kind: Kind) -> None:
    """All values of a block and of the scales are met: 256 blocks of random numbers of any size."""
    exponents = torch.arange(256.0).reshape(-1, 1) / 8 - 16
    numbers = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) * 2.0**exponents
    path = write_gguf(tmp_path / "a.gguf", {"a": numbers.clamp(-6e4, 6e4)}, kinds=kind)
    expected = read_gguf(path)[1]["a"]
    assert torch.equal(GgufFile(path).read("a").float(), expected)


def test_every_type_of_field_survives_with_its_bytes(tmp_path: Path) -> None:
    types = gguf.GGUFValueType
    values = {
        types.UINT8: 200, types.INT8: -5, types.UINT16: 60000, types.INT16: -300, types.UINT32: 2**32 - 1,
        types.INT32: -7, types.FLOAT32: 0.5, types.BOOL: True, types.UINT64: 2**64 - 1, types.INT64: -(2**60),
        types.FLOAT64: 0.1, types.STRING: "Öl\n",
    }  # fmt: skip
    fields = {f"a.{kind.name}": (value, kind) for kind, value in values.items()}
    source = write_gguf(tmp_path / "source.gguf", fields=fields)
    adapter = gguf_lora.load(source)
    assert {key: adapter.config[key].value for key in fields} == {f"a.{k.name}": v for k, v in values.items()}
    adapter.save(tmp_path / "copy.gguf")
    before, after = (gguf.GGUFReader(path).fields for path in (source, tmp_path / "copy.gguf"))
    own = {"adapter.lora.alpha", "lora_squeeze.history", "GGUF.kv_count"}
    for key in before.keys() - own:
        assert after[key].types == before[key].types and after[key].contents() == before[key].contents(), key
    assert [key for key in after if key not in own] == [key for key in before if key not in own], "order"
    assert before["adapter.lora.alpha"].contents() == ALPHA


def test_data_in_pieces_is_the_same_file(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    entries = {"a": (torch.float32, (3, 4)), "b": (torch.float16, (2,))}
    b = torch.ones(2, dtype=torch.float16)
    write_container(tmp_path / "one.gguf", {"x": Field.uint32(3)}, entries, iter([tensor, b]))
    write_container(tmp_path / "two.gguf", {"x": Field.uint32(3)}, entries, iter([*tensor.reshape(-1).split(5), b]))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    file = GgufFile(tmp_path / "one.gguf")
    assert torch.equal(file.read("a"), tensor) and torch.equal(torch.cat(list(file.pieces("b"))), b)


@pytest.mark.parametrize(
    "pieces",
    [[], [torch.ones(4)], [torch.ones(3), torch.ones(3)], [torch.ones(4, dtype=torch.float16)], [torch.ones(0)]],
    ids=["none", "too few", "too many", "dtype", "empty"],
)
def test_data_that_do_not_add_up_are_refused(tmp_path: Path, pieces: list[torch.Tensor]) -> None:
    entries = {"a": (torch.float32, (4,)), "b": (torch.float32, (1,))}
    with pytest.raises(LoraSqueezeError, match="bytes came"):
        write_container(tmp_path / "a.gguf", {}, entries, iter(pieces))


def test_a_file_that_was_shortened_while_open_is_noticed(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(good)
    adapter = gguf_lora.load(path)
    os.truncate(path, len(good) - 2000)
    with pytest.raises(LoraSqueezeError, match="it was shortened while in use: get the file again"):
        adapter.update("blk.1.ffn_up_exps")


def test_it_is_told_by_its_first_bytes(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(good)
    (tmp_path / "b.gguf").write_text("text")
    (tmp_path / "c.gguf").write_text("")
    os.mkfifo(tmp_path / "d.gguf")
    found = [name for name in ("a", "b.gguf", "c.gguf", "d.gguf", "e.gguf", ".") if gguf_lora.matches(tmp_path / name)]
    assert found == ["a"]


def kill(target: Path) -> None:
    with replace_file(target, force=True) as draft:
        draft.write_text("new")
        os.kill(os.getpid(), signal.SIGKILL)


def terminate(target: Path) -> None:
    with replace_file(target, force=True) as draft:
        draft.write_text("new")
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("end", [kill, terminate])
def test_a_kill_leaves_the_old_file_and_the_next_write_clears_up(tmp_path: Path, end: Callable[[Path], None]) -> None:
    target = tmp_path / "a.gguf"
    target.write_text("old")
    before = tree(tmp_path)
    assert in_child(lambda: end(target)) != 0
    assert target.read_text() == "old"
    if end is terminate:
        assert tree(tmp_path) == before
    with replace_file(target, force=True) as draft:
        draft.write_text("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"] and target.read_text() == "newer"


def test_a_file_that_comes_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "a.gguf"
    with (
        pytest.raises(LoraSqueezeError, match="exists already and nothing was written"),
        replace_file(target, force=False) as draft,
    ):
        draft.write_text("mine")
        target.write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"] and target.read_text() == "theirs"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with replace_file(tmp_path / "link", force=True) as draft:
        draft.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_what_the_system_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(LoraSqueezeError, match="cannot be written: Not a directory; nothing was changed"),
        replace_file(tmp_path / "file" / "a.gguf", force=False),
    ):
        pass
