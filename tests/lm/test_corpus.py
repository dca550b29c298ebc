"""Corpora from every kind of source, made here, and what each says when it is wrong."""

import hashlib
import json
import mmap
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from erlangen.lm.corpus import Corpus, Tokens, load_corpus


def text_of(tokens: Tokens) -> str:
    return b"".join(shard.astype(np.uint8).tobytes() for shard in tokens.shards).decode()


def write_llmc(path: Path, tokens, *, magic=20240520, version=1, count=None) -> None:
    """A shard as llm.c writes it, independently of the library."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    dtype = "<u4" if magic == 20240801 else "<u2"
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype(dtype).tobytes())


# --- Tokens -----------------------------------------------------------------------------------------------------------


def test_tokens():
    tokens = Tokens([np.array([3, 1], np.uint8), np.array([], np.uint16), np.array([7, 2, 5])])
    assert len(tokens) == 5
    assert len(tokens.shards) == 2
    assert tokens.max_token == 7
    assert Tokens([]).max_token == -1
    head, tail = tokens.split(3)
    assert [shard.tolist() for shard in head.shards] == [[3, 1], [7]]
    assert [shard.tolist() for shard in tail.shards] == [[2, 5]]


@pytest.mark.parametrize("shard", [np.zeros((2, 2), int), np.zeros(2), np.array([1, -1])])
def test_tokens_are_rows_of_non_negative_integers(shard):
    with pytest.raises(ValueError, match=r"1-D array of integers|not negative, got -1"):
        Tokens([shard])


def test_fingerprint_is_of_the_content(tmp_path):
    values = np.random.default_rng(0).integers(0, 200, 10_000)
    reference = Tokens([values]).fingerprint()
    values.astype(np.uint16).tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="r")
    for same in (values.astype(np.uint8), values.astype(np.uint32), mapped):
        assert Tokens([same]).fingerprint() == reference
    changed = values.copy()
    changed[5000] += 1
    assert Tokens([changed]).fingerprint() != reference
    assert Tokens([values[:5000], values[5000:]]).fingerprint() != reference, "windows lie in one shard"
    digest = hashlib.sha256(b"3;" + bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]))
    assert Tokens([np.arange(3)]).fingerprint() == digest.hexdigest()[:16], "little-endian on every machine"


def test_fingerprint_of_a_huge_map_is_sampled(tmp_path):
    with open(tmp_path / "tokens", "wb") as file:
        file.truncate(2 * (2**26 + 12_345))  # a sparse file
    mapped = np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="r+")
    reference = Tokens([mapped]).fingerprint()
    assert Tokens([mapped[:-1]]).fingerprint() != reference
    for place in (0, len(mapped) - 1):
        mapped[place] = 1
        assert Tokens([mapped]).fingerprint() != reference
        mapped[place] = 0


def test_corpus_checks_its_tokens():
    tokens = Tokens([np.arange(100_000) % 300])
    fields = {"name": "mine", "tokenizer_name": "other", "vocab_size": 300}
    assert Corpus(train=tokens, validation=tokens, **fields).train is tokens
    with pytest.raises(ValueError, match="mine are not from tokenizer 'other': it has 299 tokens, but token 299"):
        Corpus(train=tokens, validation=tokens, **(fields | {"vocab_size": 299}))
    for split in ("training", "validation"):
        train, validation = (Tokens([]), tokens) if split == "training" else (tokens, Tokens([]))
        with pytest.raises(ValueError, match=f"mine has no {split} tokens"):
            Corpus(train=train, validation=validation, **fields)


# --- text -------------------------------------------------------------------------------------------------------------


def test_stdlib():
    corpus = load_corpus()
    assert corpus.name.startswith("stdlib-3.")
    assert (corpus.tokenizer_name, corpus.vocab_size) == ("bytes", 256)
    root = Path(sysconfig.get_path("stdlib"))
    text = text_of(corpus.train) + text_of(corpus.validation)
    for module in ("argparse.py", "json/decoder.py"):
        assert (root / module).read_bytes().decode() + "\n\n" in text
    assert 0.02 < len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.3
    assert load_corpus("stdlib").train.fingerprint() == corpus.train.fingerprint()


def test_stdlib_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"has only 0 characters of them: install the complete library"):
        load_corpus()


def test_stdlib_is_source_without_tests(monkeypatch, tmp_path):
    kept, left_out = "kept = 1\n" * 300_000, "left_out\n" * 10
    for path in ("a.py", "b/c.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(kept)
    folders = ("site-packages", "b/dist-packages", "test", "b/tests", "b/idle_test", "__pycache__")
    for path in (*(f"{folder}/x.py" for folder in folders), "d.txt", "_sysconfigdata__linux_.py", "sitecustomize.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(left_out)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9 left_out")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = load_corpus()
    assert text_of(corpus.train) == text_of(corpus.validation) == kept + "\n\n"


def test_text_file_is_split_at_a_line_end(tmp_path):
    lines = [f"line {i}: é\n" for i in range(100)]
    (tmp_path / "text.txt").write_text("".join(lines), encoding="utf-8", newline="")
    corpus = load_corpus(str(tmp_path / "text.txt"), validation_fraction=0.2)
    assert corpus.name == "text.txt"
    train = text_of(corpus.train)
    assert train.endswith("\n")
    assert train + text_of(corpus.validation) == "".join(lines)
    assert len(text_of(corpus.validation)) / len("".join(lines)) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(
    ("text", "train"),
    [("ab\ncdefghij", "ab\n"), ("abcdefghij", "abcde"), ("abcdefgh\ni", "abcdefgh\n"), ("ab\ncdefgh\n", "ab\n")],
)
def test_text_with_few_line_ends(tmp_path, text, train):
    (tmp_path / "text.txt").write_bytes(text.encode())
    corpus = load_corpus(str(tmp_path / "text.txt"), validation_fraction=0.5)
    assert text_of(corpus.train) == train
    assert text_of(corpus.train) + text_of(corpus.validation) == text


def test_line_ends_are_kept(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"a\r\nb\r\nc\r\n")
    corpus = load_corpus(str(tmp_path / "text.txt"), validation_fraction=0.3)
    assert text_of(corpus.train) + text_of(corpus.validation) == "a\r\nb\r\nc\r\n"


def make_folder(root: Path, names) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"<{name}>", encoding="utf-8")


def test_folder_is_split_by_file(tmp_path):
    names = [f"{folder}{i:03d}.txt" for folder in ("", "sub/", "sub/deep/") for i in range(100)]
    make_folder(tmp_path, names)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").touch()
    make_folder(tmp_path, [".hidden/file.txt", ".hidden.txt"])
    corpus = load_corpus(str(tmp_path))
    assert corpus.name == tmp_path.name
    train, validation = text_of(corpus.train).split("\n\n")[:-1], text_of(corpus.validation).split("\n\n")[:-1]
    assert train == sorted(train)
    assert sorted(train + validation) == sorted(f"<{name}>" for name in names)
    assert 15 <= len(validation) <= 50

    make_folder(tmp_path, [f"new/{i}.txt" for i in range(50)])
    larger = load_corpus(str(tmp_path))
    assert set(validation) <= set(text_of(larger.validation).split("\n\n")), "a file stays on its side"
    assert set(train) <= set(text_of(larger.train).split("\n\n"))


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_folder_of_two_files_has_both_splits(tmp_path, fraction):
    make_folder(tmp_path, ["a.txt", "b.txt"])
    corpus = load_corpus(str(tmp_path), validation_fraction=fraction)
    assert {text_of(corpus.train), text_of(corpus.validation)} == {"<a.txt>\n\n", "<b.txt>\n\n"}


def test_folder_of_one_file_is_split_like_the_file(tmp_path):
    (tmp_path / "one.txt").write_text("a\nb\nc\nd\n")
    folder, file = load_corpus(str(tmp_path)), load_corpus(str(tmp_path / "one.txt"))
    assert folder.validation.fingerprint() == file.validation.fingerprint()


def test_documents_end_with_the_end_of_text_token(tmp_path):
    class Words:
        name, vocab_size, end_of_text = "words", 70_000, 69_999

        def encode(self, text):
            return np.array([len(word) for word in text.split()], np.uint32)

        def decode(self, tokens):
            raise NotImplementedError

    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / name).write_text("one three")
    corpus = load_corpus(str(tmp_path / "texts"), Words())
    assert [shard.tolist() for shard in corpus.train.shards] == [[3, 5, 69_999]]
    assert (corpus.tokenizer_name, corpus.vocab_size) == ("words", 70_000)


def test_max_tokens_keeps_the_shares(tmp_path):
    (tmp_path / "text.txt").write_text("0123456789abcde\n" * 1000)
    corpus = load_corpus(str(tmp_path / "text.txt"), max_tokens=1000)
    assert len(corpus.train) + len(corpus.validation) == 1000
    assert len(corpus.train) == pytest.approx(900, abs=2)


def test_tiny_shakespeare():
    folder = os.environ.get("ERLANGEN_DATA")
    if not folder:
        pytest.skip("ERLANGEN_DATA is not set")
    corpus = load_corpus(str(Path(folder, "text", "tinyshakespeare.txt")))
    assert len(corpus.train) + len(corpus.validation) == 1_115_394
    assert text_of(corpus.train).startswith("First Citizen:\n")
    assert text_of(corpus.train).endswith("\n")
    assert len(corpus.validation) == pytest.approx(111_539, abs=200)


def test_errors_of_texts(tmp_path):
    path = tmp_path / "text.txt"
    with pytest.raises(FileNotFoundError, match=r"there is no corpus '.*text\.txt': a source is 'stdlib', 'hf:NAME'"):
        load_corpus(str(path))
    for content, message in ((b"", "is empty"), (b"caf\xe9", "UTF-8 without NUL"), (b"a\0b", "UTF-8 without NUL")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_corpus(str(path))
    with pytest.raises(ValueError, match=r"needs a UTF-8 text file or a \.bin shard"):
        load_corpus(str(tmp_path))
    path.write_text("a")
    with pytest.raises(ValueError, match="has no validation tokens"):
        load_corpus(str(path))
    for fraction in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="validation_fraction is between 0 and 1"):
            load_corpus(str(path), validation_fraction=fraction)
    with pytest.raises(ValueError, match="max_tokens is at least 2"):
        load_corpus(str(path), max_tokens=1)
    with pytest.raises(ValueError, match="got 'gpt3'"):
        load_corpus(str(path), "gpt3")


# --- shards -----------------------------------------------------------------------------------------------------------


def test_one_shard_validates_on_its_tail(tmp_path):
    write_llmc(tmp_path / "data.bin", np.arange(50_000))
    corpus = load_corpus(str(tmp_path / "data.bin"), "gpt2", validation_fraction=0.2)
    assert (corpus.name, corpus.tokenizer_name, corpus.vocab_size) == ("data.bin", "gpt2", 50257)
    (train,), (validation,) = corpus.train.shards, corpus.validation.shards
    assert train.dtype == np.uint16
    owner = train
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert isinstance(owner, mmap.mmap), "read from the disk, not into memory"
    assert np.array_equal(train, np.arange(40_000))
    assert np.array_equal(validation, np.arange(40_000, 50_000))


def test_pattern_and_folder_of_shards(tmp_path):
    folder = tmp_path / "values"  # "val" in the folder's name means nothing
    folder.mkdir()
    for i in (2, 1, 0):
        write_llmc(folder / f"set_train_{i:06d}.bin", np.full(10, i))
    (folder / "notes.txt").write_text("not a shard")
    corpus = load_corpus(str(folder / "set_*.bin"), validation_fraction=0.5)
    assert [shard.tolist() for shard in corpus.train.shards] == [[0] * 10, [1] * 5]
    assert [shard.tolist() for shard in corpus.validation.shards] == [[1] * 5, [2] * 10]
    write_llmc(folder / "set_val_000000.bin", np.full(7, 9))
    for source in (folder, folder / "set_*.bin"):
        corpus = load_corpus(str(source))
        assert [shard.tolist() for shard in corpus.train.shards] == [[i] * 10 for i in range(3)]
        assert [shard.tolist() for shard in corpus.validation.shards] == [[9] * 7]
    assert len(load_corpus(str(folder), max_tokens=20).train) == 20 * 30 // 37
    with pytest.raises(ValueError, match="leaves none to train on"):
        load_corpus(str(folder / "*val*.bin"))


def test_wide_shards(tmp_path):
    write_llmc(tmp_path / "llama.bin", [1, 128_000, 3, 4], magic=20240801, version=7)

    class Llama:
        name, vocab_size, end_of_text = "llama", 128_256, 128_000

        def encode(self, text):
            raise NotImplementedError

        decode = encode

    corpus = load_corpus(str(tmp_path / "llama.bin"), Llama(), validation_fraction=0.5)
    assert corpus.train.shards[0].tolist() == [1, 128_000]
    assert corpus.train.shards[0].dtype == np.uint32
    with pytest.raises(ValueError, match="not from tokenizer 'gpt2': it has 50257 tokens, but token 128000"):
        load_corpus(str(tmp_path / "llama.bin"), "gpt2", validation_fraction=0.5)


def test_errors_of_shards(tmp_path):
    path = tmp_path / "data.bin"
    source = str(path)
    for content in (b"", b"short", np.arange(1000, dtype="<u2").tobytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"starts with the llm\.c header .* but .*data\.bin starts with magic"):
            load_corpus(source)
    write_llmc(path, [1, 2, 3], version=2)
    with pytest.raises(ValueError, match="starts with magic 20240520 version 2"):
        load_corpus(source)
    write_llmc(path, [1, 2, 3], count=4)
    with pytest.raises(ValueError, match="truncated: 4 tokens of 2 bytes make a file of 1032 bytes, but it has 1030"):
        load_corpus(source)
    write_llmc(path, [1, 2, 3], count=2)
    with pytest.raises(ValueError, match="longer than its header says"):
        load_corpus(source)
    for count in (0, -5):
        write_llmc(path, [], count=count)
        with pytest.raises(ValueError, match=f"at least one token, but the header of .* says {count}"):
            load_corpus(source)
    write_llmc(path, [1, 300, 3])
    with pytest.raises(ValueError, match="token 300 was found; give the tokenizer that made them"):
        load_corpus(source)
    write_llmc(path, [1])
    with pytest.raises(ValueError, match="has no validation tokens"):
        load_corpus(source)
    write_llmc(tmp_path / "good.bin", [1, 2, 3])
    path.write_bytes(b"no shard")
    with pytest.raises(ValueError, match=r"but .*data\.bin starts with magic 0"):
        load_corpus(str(tmp_path))


# --- Hugging Face data sets -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The datasets library, offline, with everything it keeps in tmp_path."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    # Both libraries read these variables once, when they are imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_home" / "datasets")
    return datasets


def write_documents(folder: Path, documents: list[str], field="text") -> str:
    """A data set of two files; returns its source."""
    folder.mkdir()
    half = len(documents) // 2
    for name, part in (("a", documents[:half]), ("b", documents[half:])):
        lines = [json.dumps({"id": i, field: document}) + "\n" for i, document in enumerate(part)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return f"hf:{folder}"


def expected_texts(documents: list[str], every: int) -> tuple[str, str]:
    """Training and validation text: document 1, 1 + every, ... are for validation."""
    train = "".join(document + "\n\n" for i, document in enumerate(documents) if i % every != 1)
    return train, "".join(document + "\n\n" for i, document in enumerate(documents) if i % every == 1)


def cache_folder(cache: Path) -> Path:
    (folder,) = (cache / "corpora").iterdir()
    return folder


def test_hugging_face(tmp_path, hub, monkeypatch):
    documents = [f"document {i}: größer" for i in range(57)]
    documents[3] = ""
    source = write_documents(tmp_path / "data", documents)
    monkeypatch.setenv("ERLANGEN_CACHE", str(tmp_path / "cache"))
    calls = []
    corpus = load_corpus(source, progress=lambda done, total: calls.append((done, total)))
    train, validation = expected_texts(documents, 10)
    train = train.replace("\n\n\n\n", "\n\n")  # an empty document leaves nothing
    assert (text_of(corpus.train), text_of(corpus.validation)) == (train, validation)
    assert corpus.name == source
    assert calls[0] == (0, 100_000_000)
    assert calls[-1] == (len(train.encode()) + len(validation.encode()), 100_000_000)

    def no_network(*args, **kwargs):
        raise AssertionError("a finished corpus is read from the cache")

    folder = cache_folder(tmp_path / "cache")
    monkeypatch.setattr(hub, "load_dataset", no_network)
    again = load_corpus(source)
    assert again.train.fingerprint() == corpus.train.fingerprint()
    assert load_corpus(str(folder)).validation.fingerprint() == corpus.validation.fingerprint(), "they are llm.c shards"
    with pytest.raises(ValueError, match="could not open"):
        load_corpus(source, validation_fraction=0.2)  # another corpus


def test_hugging_face_arguments(tmp_path, hub):
    documents = [f"{i:09d}" for i in range(40)]
    source = write_documents(tmp_path / "data", documents, field="body")
    corpus = load_corpus(source, text_field="body", validation_fraction=0.25, max_tokens=100, cache=tmp_path / "cache")
    train, validation = expected_texts([*documents[:9], "0"], 4)  # 100 = 9 × 11 + 1
    assert (text_of(corpus.train), text_of(corpus.validation)) == (train, validation.removesuffix("0\n\n") + "0")


def test_hugging_face_tokens_of_a_json_tokenizer(tmp_path, hub):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<eos>": 0, "?": 1, "one": 2, "two": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    source = write_documents(tmp_path / "data", ["one two", "two two", "three"])
    corpus = load_corpus(source, str(tmp_path / "words.json"), cache=tmp_path / "cache")
    assert corpus.tokenizer_name.endswith(":words.json")
    assert corpus.train.shards[0].tolist() == [2, 3, 0, 1, 0]
    assert corpus.validation.shards[0].tolist() == [3, 3, 0]


def test_hugging_face_stopped_and_continued(tmp_path, hub):
    documents = [f"{i:04d}" * 20_000 for i in range(300)]  # 24 million bytes
    source = write_documents(tmp_path / "data", documents)
    total = 22_000_000
    whole = load_corpus(source, max_tokens=total, cache=tmp_path / "whole")
    assert len(whole.train) + len(whole.validation) == total
    assert len(whole.train.shards) == 3
    train, validation = expected_texts(documents, 10)
    assert train.startswith(text_of(whole.train))
    assert validation.startswith(text_of(whole.validation))

    class Stop(Exception):
        pass

    def stop_at(limit):
        def progress(done, total):
            seen.append(done)
            if done > limit:
                raise Stop

        return progress

    cache = tmp_path / "parts"
    seen: list[int] = []
    with pytest.raises(Stop):
        load_corpus(source, max_tokens=total, cache=cache, progress=stop_at(5_000_000))
    with pytest.raises(Stop):
        load_corpus(source, max_tokens=total, cache=cache, progress=stop_at(15_000_000))
    folder = cache_folder(cache)
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.json", "train_000000.bin", "val_000000.bin"]
    written = (folder / "train_000000.bin").stat().st_mtime_ns
    # What a stop between two files leaves: shards that the list does not have, and a file aside.
    (folder / "train_000001.bin").write_bytes(b"not in the list")
    (folder / ".val_000001.bin.1.part").write_bytes(b"half")
    seen.clear()
    corpus = load_corpus(source, max_tokens=total, cache=cache, progress=stop_at(total))
    assert 10_000_000 <= seen[0] < 10_100_000, "goes on after the shards that are complete"
    assert (folder / "train_000000.bin").stat().st_mtime_ns == written
    assert corpus.train.fingerprint() == whole.train.fingerprint()
    assert corpus.validation.fingerprint() == whole.validation.fingerprint()

    # A shard damaged later is made again, and so is what follows it.
    with open(folder / "val_000001.bin", "r+b") as file:
        file.truncate(2000)
    seen.clear()
    corpus = load_corpus(source, max_tokens=total, cache=cache, progress=stop_at(total))
    assert 10_000_000 <= seen[0] < 10_100_000
    assert corpus.validation.fingerprint() == whole.validation.fingerprint()


def test_errors_of_hugging_face(tmp_path, hub):
    source = write_documents(tmp_path / "data", ["one", "two", "three", "four"])
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"split 'nosuch' of data set .*Available splits: \['train'\]\): check"):
        load_corpus(source, cache=cache, split="nosuch")
    with pytest.raises(ValueError, match="with config 'nosuch'"):
        load_corpus(f"{source}:nosuch", cache=cache)
    with pytest.raises(FileNotFoundError, match="could not open split 'train' of data set 'nosuch/name'"):
        load_corpus("hf:nosuch/name", cache=cache)
    with pytest.raises(ValueError, match=r"has NoneType in 'body': its fields with text are text"):
        load_corpus(source, cache=cache, text_field="body")
    for wrong in ("hf:", "hf:name:"):
        with pytest.raises(ValueError, match=f"'hf:NAME' or 'hf:NAME:CONFIG', got '{wrong}'"):
            load_corpus(wrong, cache=cache)
    empty = write_documents(tmp_path / "empty", ["", ""])
    with pytest.raises(ValueError, match="has none in its field 'text'"):
        load_corpus(empty, cache=cache)
    single = write_documents(tmp_path / "single", ["", "", "only"])
    with pytest.raises(ValueError, match="has no validation tokens"):
        load_corpus(single, cache=cache)
