"""`erlangen bench` as a user meets it."""

import json
import signal
import subprocess
import sys
import time

import pytest

from erlangen.bench import record
from erlangen.cli import main

VARIANTS = ("dense", "tiled", "tiled-skipping", "triton")
OPTIONS = ("--groups", "SE2", "--sizes", "32", "64", "--variants", *VARIANTS, "--rounds", "2", "--num-heads", "2")


def rows(folder):
    found = {}
    for row in record.read(folder / "lie_attention.csv"):
        config = json.loads(row["config_json"])
        key = (config["group"], config["pass"], int(row["x_value"]), row["variant"], row["metric"])
        found[key] = row | {"config": config}
    return found


def test_every_variant_size_and_pass_and_a_rerun_that_goes_on(tmp_path, capsys):
    out = tmp_path / "bench"
    assert main(["bench", "lie", *OPTIONS, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "memory, SE2, N = 32, dense" in said and "time, SE2, N = 64, forward + backward" in said
    assert f"the report: {out / 'lie_attention.html'}" in said

    found = rows(out)
    expected = {
        ("SE2", which, size, variant, metric)
        for which in ("forward", "forward + backward")
        for size in (32, 64)
        for variant in ("sdpa", *VARIANTS, "floor")
        for metric in ("time", "peak_memory")
    }
    expected |= {(*key[:3], name, "rate") for key in expected for name in ("matmul", "exp", "copy")}
    assert set(found) == expected
    for (_, _, _, variant, metric), row in found.items():
        assert row["benchmark"] == "lie_attention" and row["dtype"] == "float32" and row["device"] == "cpu"
        assert row["unit"] == {"time": "ms", "peak_memory": "MB"}.get(metric, row["unit"])
        if variant == "triton":
            assert row["median"] == "" and row["config"]["skipped"] == "it runs on CUDA only, this is cpu"
        else:
            assert float(row["median"]) >= 0
            if metric == "time":
                assert row["baseline"] == "sdpa" and float(row["ratio"]) > 0 and row["rounds"] == "2"
            if metric == "time" and variant not in ("sdpa", "floor"):
                assert float(row["q20"]) <= float(row["median"]) <= float(row["q80"])
            if metric == "time" and variant == "floor":
                assert row["config"]["per_second"]["matmul"] > 1e8

    page = (out / "lie_attention.html").read_text()
    for word in ("<svg", "floor", "it runs on CUDA only", "SDPA", "GFLOP/s"):
        assert word in page
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")

    before = (out / "lie_attention.csv").read_text()
    assert main(["bench", "lie", *OPTIONS, "--out", str(out)]) == 0
    assert (out / "lie_attention.csv").read_text() == before, "nothing is measured twice"
    assert "memory," not in capsys.readouterr().out

    changed = [*OPTIONS, "--sizes", "32", "--variants", "tiled", "--head-dim", "4", "--out", str(out)]
    assert main(["bench", "lie", *changed]) == 0
    after = (out / "lie_attention.csv").read_text()
    assert after.startswith(before) and after.count("\n") == before.count("\n") + 18, "other settings, other rows"


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    options = ["bench", "lie", *OPTIONS, "--sizes", "32", "--variants", "tiled", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "erlangen", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "lie_attention.csv"
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "keeps what was measured" in out and err == ""
    before = path.read_text()
    assert len(record.read(path)) == before.count("\n") - 1 > 0
    assert main(options) == 0
    assert path.read_text().startswith(before)
    assert len(rows(tmp_path)) == 18 == path.read_text().count("\n") - 1


def test_help(capsys):
    assert main(["bench"]) == 0
    assert "erlangen bench NAME" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "lie", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "erlangen bench lie --groups SE2" in out and "Ctrl-C" in out and "--memory-limit" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["le"], "no benchmark 'le': choose lie"),
        (["lie", "--groups", "SE9"], "no group is called 'SE9'"),
        (["lie", "--sizes", "0"], "sizes must be at least 1"),
        (["lie", "--memory-limit", "0"], "memory_limit must be positive"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "lie_attention.csv").write_text("a,b\n")
    assert main(["bench", "lie", *OPTIONS, "--out", str(tmp_path)]) == 2
    assert "another header" in capsys.readouterr().err
