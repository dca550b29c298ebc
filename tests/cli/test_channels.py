"""`erlangen channels` as a user meets it."""

import csv
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from erlangen.cli import _channels_maps, _channels_windows, main
from erlangen.finite import dihedral, energy_null, parse, reversal, reverse_complement, scan
from erlangen.finite.channels import channel_energies
from erlangen.finite.sequences import read_fasta

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'erlangen[report]'")

LENGTH = 30
GROUP = reverse_complement(LENGTH)


def random_text(generator, length):
    return "".join("ACGT"[i] for i in generator.integers(4, size=length))


def write_sequences(path, *, num=12, length=200, planted=4, opener=open):
    """Random sequences; the first few hold a perfect reverse-complement palindrome at place 50."""
    generator = np.random.default_rng(0)
    lines = []
    for number in range(num):
        text = random_text(generator, length)
        if number < planted:
            half = random_text(generator, LENGTH // 2)
            text = text[:50] + half + reverse(half) + text[50 + LENGTH :]
        lines += [f">sequence {number}", text]
    with opener(path, "wt") as file:
        file.write("\n".join(lines) + "\n")
    return path


def reverse(text):
    return text[::-1].translate(str.maketrans("ACGT", "TGCA"))


def table(folder):
    with (folder / "channels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def data(folder):
    return json.loads((folder / "channels.json").read_text())


def page(folder):
    text = (folder / "channels.html").read_text()
    assert "<svg" in text and "<script" not in text and "http" not in text.replace("http://www.w3.org", "")
    assert "nan" not in text.split("<h1>")[1].lower().replace("dominant", "")
    return text


def call(*arguments):
    return main(["channels", *map(str, arguments)])


# --- sequences --------------------------------------------------------------------------------------------------------


def test_planted_palindromes_are_found_and_nothing_else(tmp_path, capsys):
    path = write_sequences(tmp_path / "some.fa")
    out = tmp_path / "out"
    assert call(path, "--window", LENGTH, "--out", out) == 0
    said = capsys.readouterr().out
    assert f"the report: {out / 'channels.html'}" in said and "reverse_complement(30)" in said
    assert "sequence 0" in said and "4 of 2,052 windows" in said

    rows = table(out)
    found = [row for row in rows if float(row["q"]) <= 0.05]
    assert [(row["name"], row["start"], row["end"]) for row in found] == [
        (f"sequence {number}", "50", "80") for number in range(4)
    ]
    assert all(float(row["energy"]) == 1 for row in found)

    records = read_fasta(path)
    expected = scan([record.tokens for record in records], GROUP)
    assert len(rows) == len(expected.q) == 12 * 171
    for column in ("energy", "p", "q"):
        np.testing.assert_allclose([float(row[column]) for row in rows], getattr(expected, column), rtol=1e-12)

    result = data(out)
    assert result["num_found"] == 4 and result["num_windows"] == 2052 and not result["stopped"]
    assert result["null"]["samples"] is None and result["best"][0]["energy"] == 1
    assert {best["start"] for best in result["best"][:4]} == {50}
    first = next(best for best in result["best"] if best["name"] == "sequence 0")
    assert reverse(first["letters"]) == first["letters"]
    text = page(out)
    for word in ("The null distribution is exact", "sequence 0", "Mean energy of the windows", "Yekutieli", "Shaded"):
        assert word in text


def test_channels_of_all_windows_against_independent_letters(tmp_path):
    path = write_sequences(tmp_path / "some.fa", planted=0)
    for number, group in enumerate((GROUP, dihedral(6), parse("inverted_repeat(2, 3)"), parse("reversal(5)"))):
        out = tmp_path / f"out{number}"
        assert call(path, "--group", group, "--out", out) == 0
        result = data(out)
        found = result["channels"]
        assert [c["name"] for c in found] == [irrep.name for irrep in group.channels(bool(group.num_letters))]
        assert sum(c["share"] for c in found) == pytest.approx(1, abs=1e-12)
        assert sum(c["expected"] for c in found) == pytest.approx(1, abs=1e-12)
        null = energy_null(group, list(result["frequencies"].values()))
        assert found[0]["expected"] == pytest.approx(float(null.values @ null.probabilities), abs=1e-12)
        assert found[0]["share"] == pytest.approx(result["energy_mean"], abs=1e-12)
        one = read_fasta(path)[3].tokens[: group.degree]
        energies = channel_energies(torch.eye(4)[one], group, letters=bool(group.num_letters)) / group.degree
        (row,) = [r for r in table(out) if r["name"] == "sequence 3" and r["start"] == "0"]
        assert float(row["energy"]) == pytest.approx(float(energies[0]), abs=1e-6)


def test_compressed_with_unknown_letters_short_sequences_and_a_stride(tmp_path, capsys):
    path = tmp_path / "some.fasta.gz"
    write_sequences(path, num=2, planted=0, opener=gzip.open)
    with gzip.open(path, "at") as file:
        file.write(">short\nACGT\n>with N\n" + "acgtacgtac" * 3 + "N" + "ACGTTACGTA" * 3 + "\n")
    out = tmp_path / "out"
    assert call(path, "--group", "reverse_complement(10)", "--stride", "7", "--out", out) == 0
    said = capsys.readouterr().out
    assert "windows with unknown letters; 1 sequence shorter than a window." in said
    rows = table(out)
    assert {int(row["start"]) % 7 for row in rows} == {0} and "short" not in {row["name"] for row in rows}
    inside = {int(row["start"]) for row in rows if row["name"] == "with N"}
    assert inside == {s for s in range(0, 52, 7) if not s <= 30 < s + 10}
    assert "the largest energy" in page(out).lower()


def test_other_alphabets_and_groups(tmp_path):
    path = tmp_path / "proteins.faa"
    path.write_text(">repeat [of] `three`\n" + "MKV" * 30 + "\n>two\nXMKVLAGHHHNWY\n")
    out = tmp_path / "out"
    options = ("--alphabet", "ACDEFGHIKLMNPQRSTVWY", "--unknown", "X", "--out", out)
    assert call(path, *options, "--group", "(0 3 6)(1 4 7)(2 5 8)", "--window", "9") == 0
    assert float(table(out)[0]["energy"]) == 1 and data(out)["num_found"] == 82
    assert call(path, *options, "--group", "cyclic", "--window", "6") == 0, "over what was there"
    assert data(out)["group"] == "cyclic(6)"
    rna = tmp_path / "rna.fa"
    rna.write_text(">hairpin\nGGGAAAUUUCCC\n")
    assert call(rna, "--alphabet", "ACGU", "--window", "12", "--out", out) == 0
    assert data(out)["group"] == 'reverse_complement(12, "ACGU")' and float(table(out)[0]["energy"]) == 1
    swap = '(0 3)(1 2) "TGCA"'
    assert call(write_sequences(tmp_path / "dna.fa"), "--group", swap, "--window", "4", "--out", out) == 0
    same = table(out)
    assert call(tmp_path / "dna.fa", "--window", "4", "--out", out) == 0
    assert table(out) == same


# --- motifs -----------------------------------------------------------------------------------------------------------


def write_motifs(path):
    generator = np.random.default_rng(0)
    lines = ["# a comment"]

    def motif(name, text):
        lines.append(f">{name}")
        lines.extend(" ".join("90.0" if letter == c else "3.0" for c in "ACGT") for letter in text)

    for number in range(5):
        half = random_text(generator, 6)
        motif(f"MA{number}.1_MA{number}.1.palindrome", half + reverse(half))
    for number in range(40):
        motif(f"other {number}", random_text(generator, 12))
    lines += [">flat", *["5 5 5 5"] * 8]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_motifs(tmp_path, capsys):
    path = write_motifs(tmp_path / "motifs.pfm")
    out = tmp_path / "out"
    assert call(path, "--out", out, "--fdr", "0.01") == 0
    said = capsys.readouterr().out
    assert "5 of 45 motifs" in said and "Left out: 1 window without preference for any letter." in said
    rows = table(out)
    assert len(rows) == 45
    for row in rows:
        palindrome = "palindrome" in row["name"]
        assert (float(row["q"]) <= 0.01) == palindrome
        assert (float(row["energy"]) > 1 - 1e-12) == (float(row["strand_correlation"]) > 1 - 1e-12) == palindrome
        assert 0 < float(row["p"]) <= 1
    text = page(out)
    assert "The other strand" in text and ">MA0.1.palindrome<" in text, "the number is not said twice"
    assert "drawn from 50,000 windows a length" in text

    assert call(path, "--out", out, "--window", "8", "--group", "reversal") == 0
    result = data(out)
    assert result["group"] == "reversal(8)" and result["num_windows"] == 45 * 5 and "Yekutieli" in page(out)


# --- attention maps ---------------------------------------------------------------------------------------------------


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def attention(generator, *shape):
    return torch.rand(shape, generator=generator, dtype=torch.float64).mul(4).softmax(-1)


def test_transfer_of_attention_maps(tmp_path, generator, capsys):
    group = dihedral(5)
    maps = attention(generator, 3, 2, 5, 5)
    shift = torch.eye(5, dtype=torch.float64).roll(1, 0)
    maps[0, 0] = 0.2 * torch.eye(5) + 0.1 * (shift + shift.T)  # commutes
    np.save(tmp_path / "maps.npy", maps.numpy())
    out = tmp_path / "out"
    assert call(tmp_path / "maps.npy", "--group", group, "--out", out) == 0
    assert "transfer, %" in capsys.readouterr().out

    projectors = group.projectors()
    images = torch.zeros(group.order, 5, 5, dtype=torch.float64)
    for h in range(group.order):
        images[h, torch.from_numpy(group.position_map(h)), torch.arange(5)] = 1
    result = data(out)
    assert [one["map"] for one in result["maps"]] == [f"[{i}, {j}]" for i in range(3) for j in range(2)]
    for one, a in zip(result["maps"], maps.flatten(0, 1)):
        total = a.square().sum()
        transfer = [[float((p @ a @ q).square().sum() / total) for q in projectors] for p in projectors]
        np.testing.assert_allclose(one["transfer"], transfer, atol=1e-12)
        mean = (images @ a @ images.mT).mean(0)
        assert one["commuting"] == pytest.approx(float(mean.square().sum() / total), abs=1e-12)
    assert result["maps"][0]["commuting"] == pytest.approx(1, abs=1e-12)
    assert result["maps"][1]["commuting"] < 0.99
    rows = table(out)
    assert len(rows) == 6 * len(projectors)
    assert sum(float(row["to"]) for row in rows) == pytest.approx(6)
    text = page(out)
    assert text.count("<svg") == 2 and "index in dimension 1" in text and "from channel" in text


def test_safetensors_in_half_precision_windows_and_many_channels(tmp_path, generator):
    path = tmp_path / "maps.safetensors"
    save_file({"b": attention(generator, 2, 24, 24).bfloat16(), "a": attention(generator, 24, 24)}, path)
    out = tmp_path / "out"
    assert call(path, "--group", "cyclic", "--window", "20", "--stride", "2", "--out", out) == 0
    result = data(out)
    assert [one["map"] for one in result["maps"]] == ["a", "b[0]", "b[1]"] and result["num_windows_of_a_map"] == 3
    assert np.sum(result["transfer_mean"]) == pytest.approx(1, abs=1e-12)
    assert len(result["channels"]) == 11 and "4 others" in page(out)
    assert call(path, "--out", out) == 0
    assert data(out)["group"] == "reversal(24)"


# --- stopping, writing ------------------------------------------------------------------------------------------------


def test_ctrl_c_writes_what_was_measured(tmp_path, monkeypatch, capsys):
    path = write_sequences(tmp_path / "some.fa")
    out = tmp_path / "out"
    monkeypatch.setattr(_channels_windows, "CHUNK", LENGTH * 300)
    calls = []

    def stopped(windows, group, real=_channels_windows.invariant_energy):
        calls.append(len(windows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(windows, group)

    monkeypatch.setattr(_channels_windows, "invariant_energy", stopped)
    assert call(path, "--window", LENGTH, "--out", out) == 130
    assert "stopped after 600 of 2,052 windows" in capsys.readouterr().out
    assert len(table(out)) == 600 and data(out)["stopped"]
    assert "It was stopped after 600 of 2,052 windows" in page(out)
    np.save(tmp_path / "maps.npy", np.ones((4, 3, 3)))

    def at_once(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_channels_maps, "channel_transfer", at_once)
    before = (out / "channels.csv").read_bytes()
    assert call(tmp_path / "maps.npy", "--out", out) == 130
    assert "erlangen: stopped" in capsys.readouterr().err
    assert (out / "channels.csv").read_bytes() == before, "nothing was measured, so nothing is written"


def test_nothing_is_half_written(tmp_path, monkeypatch, capsys):
    path = write_sequences(tmp_path / "some.fa")
    out = tmp_path / "out"

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert call(path, "--out", out) == 2
    assert "no space left" in capsys.readouterr().err
    assert not list(out.iterdir())


def test_results_of_something_else_are_left_alone(tmp_path, capsys):
    path = write_sequences(tmp_path / "some.fa")
    (tmp_path / "channels.csv").write_text("mine\n")
    assert call(path, "--out", tmp_path) == 2
    assert "holds channels.csv of something else" in capsys.readouterr().err
    (tmp_path / "channels.json").write_text("[]")
    assert call(path, "--out", tmp_path) == 2
    assert (tmp_path / "channels.csv").read_text() == "mine\n"


def test_a_table_of_too_many_windows_has_the_most_significant(tmp_path, monkeypatch):
    path = write_sequences(tmp_path / "some.fa")
    assert call(path, "--window", LENGTH, "--out", tmp_path / "all") == 0
    monkeypatch.setattr(_channels_windows, "MAX_ROWS", 50)
    assert call(path, "--window", LENGTH, "--out", tmp_path / "some") == 0
    every, some = table(tmp_path / "all"), table(tmp_path / "some")
    assert len(some) == 50 and [row for row in every if row in some] == some
    assert max(float(row["p"]) for row in some) <= sorted(float(row["p"]) for row in every)[49]
    assert "the 50 most significant windows" in page(tmp_path / "some")


# --- help and errors --------------------------------------------------------------------------------------------------


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        call("--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for word in ("erlangen channels peaks.fa", "attention.npy", "Ctrl-C", "--group", "--window", "--fdr", "--out"):
        assert word in out
    assert main(["--help"]) == 0
    assert "channels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.fa"], "nowhere.fa does not exist"),
        (["."], "is a folder"),
        (["some.txt"], "the ending of some.txt does not say what it holds"),
        (["maps.npy.gz"], "the ending of maps.npy.gz"),
        (["text.fa"], "a FASTA file begins with a header '>name', received 'hello'"),
        (["empty.fa"], "holds no sequence"),
        (["letters.fa"], "received 'Z' at place 2"),
        (["n.fa"], "has unknown letters only"),
        (["n2.fa"], "holds unknown letters: take a smaller --window"),
        (["some.fa", "--window", "201"], "longer than every sequence of some.fa, the longest of which has 200"),
        (["some.fa", "--window", "0"], "--window must be at least 1"),
        (["some.fa", "--stride", "0"], "--stride must be at least 1"),
        (["some.fa", "--fdr", "1"], "--fdr must be between 0 and 1, received 1"),
        (["some.fa", "--out", "some.txt"], "--out some.txt is a file"),
        (["some.fa", "--group", "dihedrall(6)"], "the name of a group"),
        (["some.fa", "--group", "dihedral(6)", "--window", "7"], "does not fit a --window of 7"),
        (["some.fa", "--group", "(0 1)"], "need a --window"),
        (["some.fa", "--group", "(0 9)", "--window", "4"], "cycles of positions 0 to 3"),
        (["some.fa", "--group", "symmetric(30)"], "symmetric(30)"),
        (["some.fa", "--group", "reverse_complement(8)", "--alphabet", "ACGU"], "has the letters 'ACGT'"),
        (["some.fa", "--group", "group(2, 3: (0 1) [1, 0, 2])"], "changes 3 letters"),
        (["motifs.pfm", "--window", "13"], "longer than every motif of motifs.pfm"),
        (["motifs.pfm", "--alphabet", "ACGU"], "the letters of motifs are those of 'ACGT'"),
        (["text.pfm"], "a motif begins with a header"),
        (["pickled.npy"], "pickled.npy is no array of numbers"),
        (["text.npy"], "text.npy is no array of numbers"),
        (["flat.npy"], "must be attention maps, real numbers [.., N, N], received float64 [2, 3]"),
        (["complex.npy"], "received complex128 [3, 3]"),
        (["none.npy"], "received float64 [0, 3, 3]"),
        (["zero.npy"], "must be finite and not all zero, received [1] of zero.npy"),
        (["infinite.npy"], "must be finite and not all zero, received map of infinite.npy"),
        (["good.npy", "--group", "dihedral(6)"], "has more positions than the maps of good.npy, received 3"),
        (["text.safetensors"], "text.safetensors is not in the format of safetensors"),
        (["sizes.safetensors"], "maps of sizes 3, 4: give a --window"),
        (["row.safetensors"], "row.safetensors: row must be attention maps"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_sequences(tmp_path / "some.fa", num=2, planted=0)
    write_motifs(tmp_path / "motifs.pfm")
    for name in ("some.txt", "text.fa", "text.pfm", "text.npy", "text.safetensors", "maps.npy.gz"):
        (tmp_path / name).write_text("hello\n")
    (tmp_path / "empty.fa").write_text("")
    (tmp_path / "letters.fa").write_text(">one\nACZT\n")
    (tmp_path / "n.fa").write_text(">one\n" + "N" * 30 + "\n")
    (tmp_path / "n2.fa").write_text(">one\n" + ("A" * 10 + "N") * 4 + "\n")
    np.save("pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    bad = {"flat": np.ones((2, 3)), "complex": np.ones((3, 3), complex), "none": np.ones((0, 3, 3))}
    bad |= {"zero": np.stack([np.eye(3), 0 * np.eye(3)]), "infinite": np.full((3, 3), np.inf), "good": np.eye(3)}
    for name, array in bad.items():
        np.save(f"{name}.npy", array)
    save_file({"a": torch.eye(3), "b": torch.eye(4)}, "sizes.safetensors")
    save_file({"row": torch.ones(3)}, "row.safetensors")
    before = sorted(tmp_path.iterdir())
    assert main(["channels", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("erlangen channels: ") and len(err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_heavy_before_the_command_is_known():
    code = "import sys, erlangen.cli; print('matplotlib' in sys.modules, 'erlangen.finite' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_reversal_is_what_maps_have_by_default(tmp_path):
    np.save(tmp_path / "map.npy", np.arange(9.0).reshape(3, 3))
    assert call(tmp_path / "map.npy", "--out", tmp_path / "out") == 0
    assert data(tmp_path / "out")["group"] == str(reversal(3))
