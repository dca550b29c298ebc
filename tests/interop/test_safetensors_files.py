"""Reading and writing of safetensors against the library of that name, and what is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erlangen.interop import _safetensors as files

TENSORS = {
    "b": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "half": torch.linspace(-1, 1, 12, dtype=torch.float16).reshape(4, 3),
    "brain": torch.linspace(-1, 1, 10).bfloat16(),
    "a.double": torch.linspace(0, 1, 7, dtype=torch.float64)[:, None],
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "mask": torch.tensor([[True, False, True]]),
    "ids": torch.arange(6),
    "ünï": torch.tensor([1, 2], dtype=torch.uint8),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt", "who": "me"})
    return tmp_path / "x.safetensors"


def test_reads_what_the_library_wrote(path):
    file = files.open_file(path)
    assert file.metadata == {"format": "pt", "who": "me"}
    assert file.entries.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        found = files.read(path, file.entries[name])
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    part = files.read(path, file.entries["b"], 1, 3)
    assert torch.equal(part, TENSORS["b"][1:3])
    assert files.read(path, file.entries["b"], 4, 9).shape == (1, 3)
    assert files.read(path, file.entries["b"], 3, 2).shape == (0, 3)


def test_a_copy_is_equal_byte_for_byte(path, tmp_path):
    source = files.open_file(path)
    target = files.create(tmp_path / "y.safetensors", source, {})
    files.copy(source, target, source.entries)
    assert target.path.read_bytes() == path.read_bytes()
    with pytest.raises(FileExistsError):
        files.create(tmp_path / "y.safetensors", source, {})


def test_tensors_are_put_into_their_places_in_any_order(path, tmp_path):
    source = files.open_file(path)
    target = files.create(tmp_path / "y.safetensors", source, {})
    for name in reversed(TENSORS):
        tensor = TENSORS[name] if TENSORS[name].dtype == torch.bool else TENSORS[name] * 2
        files.write(target.path, target.entries[name], tensor)
    for name, tensor in load_file(target.path).items():
        expected = TENSORS[name] if tensor.dtype == torch.bool else TENSORS[name] * 2
        assert torch.equal(tensor, expected), name


def test_tensors_added_behind(path, tmp_path):
    source = files.open_file(path)
    added = {"new": (torch.bfloat16, (2, 3)), "more": (torch.float32, (1,))}
    target = files.create(tmp_path / "y.safetensors", source, added)
    files.copy(source, target, source.entries)
    files.write(target.path, target.entries["new"], torch.full((2, 3), 1.5, dtype=torch.bfloat16))
    loaded = load_file(target.path)
    assert loaded.keys() == TENSORS.keys() | added.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert torch.equal(loaded["new"], torch.full((2, 3), 1.5, dtype=torch.bfloat16))
    with safe_open(target.path, "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}
    assert len(target.header) % 8 == 0
    assert files.open_file(target.path).entries == target.entries


def test_a_spool_becomes_a_file(tmp_path):
    spool = files.Spool(tmp_path / "spool")
    with pytest.raises(FileExistsError):
        files.Spool(tmp_path / "spool")
    spool["b"] = torch.zeros(7)  # set again in another size below
    spool["gone"] = torch.ones(3)
    spool["ids"] = TENSORS["ids"] - 1  # and in the same size
    place = spool._entries["ids"]
    for name, tensor in TENSORS.items():
        spool[name] = tensor
    del spool["gone"]
    assert spool._entries["ids"] == place
    assert list(spool) == ["b", "ids", *(name for name in TENSORS if name not in ("b", "ids"))]
    assert all(torch.equal(spool[name], tensor) for name, tensor in TENSORS.items())
    with pytest.raises(KeyError):
        spool["gone"]
    transposed = torch.arange(6.0).reshape(2, 3).T
    spool["strided"] = transposed
    spool.save(tmp_path / "saved.safetensors")
    assert not (tmp_path / "spool").exists()
    found = load_file(tmp_path / "saved.safetensors")
    assert found.keys() == {*TENSORS, "strided"} and torch.equal(found["strided"], transposed)
    read = files.Tensors(files.open_file(tmp_path / "saved.safetensors"))
    assert len(read) == len(found) and "gone" not in read and read.get("gone") is None
    for name, expected in TENSORS.items():
        assert found[name].dtype == read[name].dtype == expected.dtype
        assert torch.equal(found[name], expected) and torch.equal(read[name], expected)
    read["b"].zero_()
    assert torch.equal(read["b"], TENSORS["b"]), "what is read is one's own"


def test_a_spool_of_nothing(tmp_path):
    files.Spool(tmp_path / "spool").save(tmp_path / "saved.safetensors")
    assert load_file(tmp_path / "saved.safetensors") == {}
    with pytest.raises(FileExistsError):
        files.Spool(tmp_path / "spool").save(tmp_path / "saved.safetensors")
    files.Spool(tmp_path / "other").remove()
    assert not (tmp_path / "other").exists()


def header(table, length=None, data=b""):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BROKEN = {
    "nothing": (b"", "no length"),
    "a web page": (b"<!DOCTYPE html><html><body>404 not found</body></html>", "not in the format"),
    "a zip": (b"PK\x03\x04" + bytes(100), "not in the format"),
    "a pointer of git": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", "not in the format"),
    "a list": (header([1, 2]), "damaged"),
    "no JSON": (header(b"{this is not"), "damaged"),
    "a header cut off": (header({"a": one()})[:-6], "cut off"),
    "tensors cut off": (header({"a": one()}, data=bytes(7)), "cut off"),
    "more than tensors": (header({"a": one()}, data=bytes(9)), "1 bytes behind"),
    "an unknown dtype": (header({"a": one("F13")}, data=bytes(8)), "unknown dtype F13"),
    "a shape of another size": (header({"a": one(shape=(3,))}, data=bytes(8)), "do not make"),
    "a negative shape": (header({"a": one(shape=(-2,))}, data=bytes(8)), "natural numbers"),
    "a place that is a text": (header({"a": one(offsets=("0", "8"))}, data=bytes(8)), "damaged"),
    "a gap": (header({"a": one(), "b": one(offsets=(12, 20))}, data=bytes(20)), "do not follow"),
    "an overlap": (header({"a": one(), "b": one(offsets=(4, 12))}, data=bytes(12)), "do not follow"),
    "a name twice": (
        header(f'{{"a": {json.dumps(one())}, "a": {json.dumps(one())}}}'.encode(), data=bytes(8)),
        "twice",
    ),
    "a tensor without a place": (header({"a": {"dtype": "F32", "shape": [2]}}, data=bytes(8)), "damaged"),
}


@pytest.mark.parametrize(("content", "words"), BROKEN.values(), ids=BROKEN)
def test_damaged_files_are_refused(content, words, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        files.open_file(path)
    assert str(path) in str(error.value)


def test_every_length_that_is_too_short_is_refused(path):
    content = path.read_bytes()
    for length in (*range(16), 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError):
            files.open_file(path)


def test_dtypes_that_are_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header({"a": one("F8_E4M3", (8,))}, data=bytes(8)))
    entry = files.open_file(path).entries["a"]
    with pytest.raises(ValueError, match="F8_E4M3"):
        files.read(path, entry)
