"""Tokenizers through load_tokenizer, on files and vocabularies made here."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erlangen.lm.tokenizers import load_tokenizer

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Runs of white space of every kind beside words, numbers and punctuation: where cuts can go wrong.
FRAGMENTS = ["word", "Über", "don't", "12", "3456", ".", "...", "--", "(", "字", "😀", " ", "  ", "\t", "\n", "\n\n"]
FRAGMENTS += ["\r\n", "\r\n\r\n", " \n", "\n ", "\n\t\t", "<|endoftext|>"]


def hard_text(length: int) -> str:
    rng = random.Random(0)
    parts, size = [], 0
    while size < length:
        parts.append(rng.choice(FRAGMENTS))
        size += len(parts[-1])
    return "".join(parts)


def train_json(path, *, add_prefix_space=False):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([hard_text(20_000).replace("<|endoftext|>", "")], trainer)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


@given(st.text())
def test_bytes_are_utf8(text):
    tokenizer = load_tokenizer("bytes")
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint8
    assert tokens.tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens.tolist()) == text


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("bytes", 256, None)
    assert tokenizer.decode([104, 255]) == "h\N{REPLACEMENT CHARACTER}"
    with pytest.raises(ValueError, match="character 1 is a lone surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("tokens", [[0, 256], [-1, 5]])
def test_decode_refuses_foreign_tokens(tokens):
    with pytest.raises(ValueError, match=r"tokens of 'bytes' are from 0 to 255, got"):
        load_tokenizer("bytes").decode(tokens)


@pytest.mark.parametrize("tokens", [[[1, 2]], [0.5]])
def test_decode_takes_one_row_of_integers(tokens):
    with pytest.raises(ValueError, match="1-D array of integers"):
        load_tokenizer("bytes").decode(tokens)


def test_json(tmp_path):
    original = train_json(tmp_path / "small.json")
    tokenizer = load_tokenizer(str(tmp_path / "small.json"))
    kind, digest, name = tokenizer.name.split(":")
    assert (kind, len(digest), name) == ("json", 12, "small.json")
    assert tokenizer.vocab_size == original.get_vocab_size() == 330
    assert tokenizer.end_of_text == original.token_to_id("<|endoftext|>")
    text = "don't stop,  Über\n\n12 <|endoftext|> (字)"
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == original.encode(text).ids, "neither cut nor filled as the file asks"
    assert len(tokens) > 7
    assert tokenizer.end_of_text not in tokens, "a control token spelled out is text"
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"
    (tmp_path / "copy.json").write_bytes((tmp_path / "small.json").read_bytes())
    assert load_tokenizer(str(tmp_path / "copy.json")).name == f"json:{digest}:copy.json"


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_json_large_text_is_as_in_one_call(tmp_path, add_prefix_space):
    original = train_json(tmp_path / "small.json", add_prefix_space=add_prefix_space)
    text = hard_text(700_000)
    tokens = load_tokenizer(str(tmp_path / "small.json")).encode(text)
    assert np.array_equal(tokens, original.encode(text, add_special_tokens=False).ids)


def test_a_wrong_cut_would_be_seen():
    """The comparison above can fail: cut after the line end, the pattern of GPT-2 gives other tokens."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"\n\n": 256}
    encoding = tiktoken.Encoding("small", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert encoding.encode("a\n\n") + encoding.encode("b") != encoding.encode("a\n\nb")
    assert encoding.encode("a") + encoding.encode("\n\nb") == encoding.encode("a\n\nb")


def test_gpt2_large_text_is_as_in_one_call(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    merges = [b"\n\n", b"  ", b"\r\n", b"wo", b"word", b" w", b"12", b"..", b"\xc3\x9c", b".\n", b"d\n", b"\n\n\n"]
    ranks = {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)}
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    text = hard_text(900_000)
    calls = []
    monkeypatch.setattr(
        encoding,
        "encode_ordinary",
        lambda text: calls.append(len(text)) or type(encoding).encode_ordinary(encoding, text),
    )
    tokenizer = load_tokenizer("gpt2")
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16
    assert max(calls) < 300_000
    assert np.array_equal(tokens, type(encoding).encode_ordinary(encoding, text))
    assert tokenizer.decode(tokens) == text
    assert tokenizer.encode("").shape == (0,)


def test_gpt2_without_network(monkeypatch, tmp_path):
    pytest.importorskip("tiktoken")
    from tiktoken import registry

    monkeypatch.delitem(registry.ENCODINGS, "gpt2", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens at the discard port
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("gpt2", 50257, 50256)
    with pytest.raises(FileNotFoundError, match=r"^the gpt2 vocabulary is not on this machine.*TIKTOKEN_CACHE_DIR"):
        tokenizer.encode("text")


def test_gpt2_vocabulary():
    pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer("gpt2")
    try:
        tokens = tokenizer.encode("Hello world<|endoftext|>")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert tokens.tolist()[:2] == [15496, 995]
    assert tokenizer.end_of_text not in tokens
    assert tokenizer.decode(tokens) == "Hello world<|endoftext|>"


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"'bytes', 'gpt2' or the path of a tokenizers JSON file, got 'gpt3'"):
        load_tokenizer("gpt3")
    with pytest.raises(FileNotFoundError, match=r"there is no tokenizer file .*missing\.json"):
        load_tokenizer(str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="is a folder: name the tokenizer"):
        load_tokenizer(str(tmp_path))
    pytest.importorskip("tokenizers")
    for content in (b"{}", b"no json", b"\xff\xfe", json.dumps({"model": {"type": "BPE"}}).encode()):
        (tmp_path / "wrong.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"wrong\.json is not a tokenizer of the tokenizers library"):
            load_tokenizer(str(tmp_path / "wrong.json"))
