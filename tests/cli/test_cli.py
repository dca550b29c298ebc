"""The command line as a user meets it."""

import subprocess
import sys

import pytest

from erlangen.cli import main
from erlangen.cli.train import parse


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "erlangen", *arguments], capture_output=True, text=True, **options)


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "tour" in capsys.readouterr().out
    assert main([]) == 0
    for command in ("train", "tour"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert f"erlangen {command} " in out, "an example"
        assert "Ctrl-C" in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("erlangen 0.")


def test_unknown_command(capsys):
    assert main(["tarin"]) == 2
    assert "choose tour or train" in capsys.readouterr().err


def test_presets_and_fields():
    command = parse(["--preset", "124m", "--model.num-kv-heads", "4", "--optimizer.name", "ecd", "--optimizer.F0", "2"])
    model = command.config.model
    assert (model.num_layers, model.dim, model.num_kv_heads) == (12, 768, 4)
    assert command.config.optimizer.settings() == {"F0": 2.0}
    assert parse(["--preset=small"]).config.model.dim == 384
    assert parse([]).config.model.dim == 128
    command = parse(["--breaking.enabled", "--breaking.query-std", "0", "0.1", "--breaking.redraw", "step"])
    assert command.config.breaking.enabled and command.config.breaking.query_std == (0.0, 0.1)


def test_train_and_resume(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a rose is a rose is a rose.\n" * 400)
    out = tmp_path / "run"
    arguments = ("--data.corpus", str(text), "--model.context-length", "16", "--model.num-layers", "1")
    first = run("train", *arguments, "--steps", "6", "--eval-every", "3", "--out", str(out))
    assert first.returncode == 0, first.stderr
    assert "step 3: loss" in first.stdout and " ± " in first.stdout and f"done: {out}" in first.stdout
    again = run("train", "--resume", str(out))
    assert again.returncode == 0 and f"done: {out}" in again.stdout
    twice = run("train", *arguments, "--out", str(out))
    assert twice.returncode == 2 and "holds a run already" in twice.stderr
    assert len(twice.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--optimizer.name", "adamm"), "invalid choice"),
        (("--optimizer.name", "adamw", "--optimizer.eta", "3"), "eta"),
        (("--preset", "huge"), "huge"),
        (("--data.tokenizer", "no-such-tokenizer"), "no-such-tokenizer"),
        (("--resume", "nowhere"), "nowhere does not exist"),
        (("--model.dim", "30"), "num_heads must divide dim"),
    ],
)
def test_bad_input_is_one_message_without_a_traceback(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["train", *arguments])
    except SystemExit as stopped:  # of the parser
        status = stopped.code
    assert status == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_bad_input_in_a_process_of_its_own(tmp_path):
    result = run("train", "--resume", "nowhere", cwd=tmp_path)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1) and "nowhere does not exist" in result.stderr
