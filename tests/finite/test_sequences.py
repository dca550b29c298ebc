"""Files of sequences and motifs: what is read, and what is refused with file and line."""

import gzip

import numpy as np
import pytest

from erlangen.finite.sequences import UNKNOWN, encode, read_fasta, read_pfm

FASTA = ">chr1:3-9 a site\nGAAT\nTC\n\n>second\nacgtnN\n"
PFM = "# a comment\n>MA1_one\n4 16 0 0\n19.5\t0\t1\t0\n\n>two\n0 0 0 1\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="x.fa"):
        path = tmp_path / name
        data = text if isinstance(text, bytes) else text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def test_encode():
    assert encode("GAATTC").tolist() == [2, 0, 0, 3, 3, 1]
    assert encode("gAnN", unknown="N").tolist() == [2, 0, UNKNOWN, UNKNOWN]
    assert encode("", "ACGT").shape == (0,)
    assert encode("aA", "aA").tolist() == [0, 1]  # an alphabet that tells small letters from capitals
    assert encode("GA").dtype == np.int64


@pytest.mark.parametrize("name", ["x.fa", "x.fa.gz"])
def test_fasta(write, name):
    first, second = read_fasta(write(FASTA, name), unknown="N")
    assert first.name == "chr1:3-9 a site"
    assert first.tokens.tolist() == encode("GAATTC").tolist()
    assert second.tokens.tolist() == [0, 1, 2, 3, UNKNOWN, UNKNOWN]


def test_fasta_of_proteins_and_of_other_line_ends(write):
    alphabet = "ACDEFGHIKLMNPQRSTVWY"
    (record,) = read_fasta(write(">p\r\nMKV\r\nLW\r\n"), alphabet)
    assert "".join(alphabet[token] for token in record.tokens) == "MKVLW"


@pytest.mark.parametrize("name", ["x.pfm", "x.pfm.gz"])
def test_pfm(write, name):
    one, two = read_pfm(write(PFM, name))
    assert (one.name, two.name) == ("MA1_one", "two")
    assert one.counts.tolist() == [[4, 16, 0, 0], [19.5, 0, 1, 0]]
    assert two.counts.dtype == np.float64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">a\nACGT\nACXT\n", r"x.fa:3: the letters are those of 'ACGT', received 'X' at place 2 .* unknown='X'"),
        (">a\nACnT\n", r"x.fa:2: .* received 'n' .* unknown='N'"),
        ("ACGT\n", r"x.fa:1: a FASTA file begins with a header"),
        (">a\n>b\nA\n", r"x.fa:1: the sequence 'a' has no letters"),
        (">a\nA\n\n>b\n", r"x.fa:4: the sequence 'b' has no letters"),
        ("\n", r"x.fa holds no sequence"),
        (b">a\nAC\n\xff\xfe\n", r"x.fa:3: not text in UTF-8"),
    ],
)
def test_bad_fasta(write, text, message):
    with pytest.raises(ValueError, match=message):
        read_fasta(write(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">a\n1 2 3\n", r"x.fa:2: a row of a motif is four counts.*received '1 2 3'"),
        (">a\nA [ 1 2 3 4 ]\n", r"x.fa:2: a row of a motif is four counts"),
        (">a\n1 2 3 4\n1 -2 3 4\n", r"x.fa:3: "),
        (">a\n1 2 nan 4\n", r"x.fa:2: "),
        (">a\n1 2 inf 4\n", r"x.fa:2: "),
        (">a\n0 0 0 0\n", r"x.fa:2: .*not all zero"),
        ("1 2 3 4\n", r"x.fa:1: a motif begins with a header"),
        (">a\n# nothing\n>b\n1 2 3 4\n", r"x.fa:1: the motif 'a' has no rows"),
        ("# nothing\n", r"x.fa holds no motif"),
    ],
)
def test_bad_pfm(write, text, message):
    with pytest.raises(ValueError, match=message):
        read_pfm(write(text))


def test_damaged_and_missing_files(write, tmp_path):
    cut = write(FASTA * 100, "cut.fa.gz")
    cut.write_bytes(cut.read_bytes()[:-20])
    plain = tmp_path / "plain.fa.gz"
    plain.write_text(FASTA)
    for path in (cut, plain):
        with pytest.raises(ValueError, match="damaged, or not compressed"):
            read_fasta(path, unknown="N")
    with pytest.raises(FileNotFoundError):
        read_fasta(tmp_path / "absent.fa")


def test_bad_alphabets():
    for alphabet, unknown in (("", ""), ("ACGA", ""), ("ACGT", "T"), ("ACGT", "NN")):
        with pytest.raises(ValueError, match=r"must be different, received alphabet="):
            encode("A", alphabet, unknown=unknown)


def test_real_files(dna):
    records = read_fasta(dna / "nanog_positives_test.fa")
    assert len(records) == 960
    assert {len(record.tokens) for record in records} == {200}
    assert records[0].name == "chr1:7358434-7358634"
    assert records[0].tokens[:8].tolist() == encode("GTGGATCC").tolist()
    motifs = read_pfm(dna / "JASPAR2022.pfm")
    assert len(motifs) == 1997
    assert sum(len(motif.counts) >= 6 for motif in motifs) == 1984
    assert motifs[0].name == "MA0004.1_MA0004.1.Arnt"
    assert motifs[0].counts[1].tolist() == [19, 0, 1, 0]
