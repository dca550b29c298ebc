"""What ``erlangen train`` says of the gauge directions: at validations, and on the page of a finished run."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from erlangen import lm
from erlangen.cli import main
from erlangen.cli._train_page import NAME, train_page
from erlangen.cli.train import parse
from erlangen.lm import BreakingConfig, DataConfig, GPTConfig, OptimizerConfig, ReductionConfig, TrainConfig
from erlangen.lm.settings import from_dict

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'erlangen[report]'")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("a rose is a rose is a rose.\n" * 400)
    return path


@pytest.fixture
def run(text_file, tmp_path):
    """A function that trains for a few steps and gives the config and the result."""

    def make(**fields):
        config = TrainConfig(
            data=DataConfig(corpus=str(text_file)),
            model=GPTConfig(context_length=8, num_layers=2, num_heads=2, dim=8),
            optimizer=OptimizerConfig(name="adamw", lr=1e-3),
            steps=4,
            batch_size=2,
            eval_every=2,
            eval_windows=4,
            out=tmp_path / "run",
        )
        config = replace(config, **fields)
        return config, lm.train(config)

    return make


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)))


def figures_of(page):
    return re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)


def test_the_page_of_a_run(run):
    config, result = run()
    page = train_page("mine", config, result.records)
    text = text_of(page)
    last = result.validation[-1]
    assert f"{last['validation_loss']:.4f} ± {last['validation_standard_error']:.4f} nats a token" in text
    assert f"{100 * last['gauge']['vertical_share']:.2g} % of the squared size on heads" in text
    assert len(figures_of(page)) == 5 and "<script" not in page
    assert "4 steps of 16 tokens" in text and "reduction.kind" in text
    for layer, sectors in last["gauge"]["layers"].items():
        row = re.search(rf"<th scope=\"row\">{layer}</th>(.*?)</tr>", page[page.index("Layer by layer</h2>") :])
        assert row is not None
        cells = [float(cell.replace("−", "-")) for cell in re.findall(r">([^<]+)</td>", row[1])]
        expected = [
            100 * np.mean(sectors[sector][name])
            for sector in ("qk", "vo")
            for name in ("vertical_share", "charge_drift", "orbit_distance")
        ]
        assert cells == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"breaking": BreakingConfig(enabled=True)}, "would not change without the unlearned biases"),
        ({"reduction": ReductionConfig(kind="horizontal")}, "without their part in gauge directions"),
        ({"reduction": ReductionConfig(kind="dressed", every=2)}, "measured before they are dressed"),
        ({"reduction": ReductionConfig(kind="chart")}, "held in a chart"),
        ({"reduction": ReductionConfig(kind="invariant")}, "of the Frobenius metric"),
        (
            {"model": GPTConfig(context_length=8, num_layers=1, num_heads=2, dim=8, qk_norm=True)},
            "only values and outputs count",
        ),
    ],
)
def test_what_kinds_of_runs_say(run, fields, words):
    config, result = run(**fields)
    assert words in text_of(train_page("mine", config, result.records))


def test_pages_of_short_and_silent_runs(run):
    config, result = run(steps=1, log_gauge=False, log_charges=False)
    page = train_page("mine", config, result.records)
    assert len(figures_of(page)) == 1 and "Gauge directions" not in page and "Noether" not in page
    config, result = run(steps=1, out=config.out.with_name("again"))
    page = train_page("mine", config, result.records)
    assert "There was one validation" in page and "at the one validation" in page


def test_a_long_run_is_thinned():
    records = [{"step": 0, "validation_loss": 5.0, "validation_standard_error": None, "validation_windows": 1}]
    for step in range(1, 5001):
        records.append({"step": step, "loss": 5.0 - step / 5000})
        if step % 100 == 0:
            records.append({**records[0], "step": step, "validation_loss": 5.0 - step / 5000})
    page = train_page("long", TrainConfig(steps=5000), records)
    assert len(page) < 80_000 and "12 of 51 validations" in text_of(page) and "mean over 17 or so steps" in page
    rows = re.findall(r'<th scope="row">(\d+)</th>', page)
    assert rows[0] == "0" and rows[-1] == "5000" and len(rows) == 12


def test_the_command_speaks_of_the_gauge_and_writes_the_page(text_file, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [
        "train", "--data.corpus", str(text_file), "--out", str(out), "--model.context-length", "8", "--model.dim", "8",
        "--model.num-layers", "1", "--steps", "4", "--eval-every", "2", "--reduction.kind", "dressed",
        "--reduction.every", "3",
    ]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert re.search(r"step 2: loss .* ± .*; along gauge \S+ %, charge drift \S+ %, products moved \S+ %\n", said)
    assert f"report: {out / NAME}" in said and (out / NAME).read_text().startswith("<!DOCTYPE html>")
    config = from_dict(TrainConfig, json.loads((out / "config.json").read_text()))
    assert config.reduction == ReductionConfig(kind="dressed", every=3)
    (out / NAME).unlink()
    assert main(["train", "--resume", str(out)]) == 0
    assert (out / NAME).exists() and not list(out.glob(".*"))


@pytest.mark.parametrize("error", [ImportError("no matplotlib: install it"), OSError("no space left on device")])
def test_a_page_that_cannot_be_written_fails_no_run(text_file, tmp_path, capsys, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("erlangen.cli._train_page.train_page", fail)
    arguments = ["--data.corpus", str(text_file), "--out", str(tmp_path / "run"), "--model.context-length", "8"]
    assert main(["train", *arguments, "--model.num-layers", "1", "--model.dim", "8", "--steps", "1"]) == 0
    said = capsys.readouterr().out
    assert f"no report was written: {error}" in said and "done: " in said
    assert not (tmp_path / "run" / NAME).exists()


def test_the_help_shows_reductions(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert "--reduction.kind" in shown and "horizontal" in shown and "--log-gauge" in shown
    command = parse(["--reduction.kind", "invariant", "--reduction.lr", "0.2", "--no-log-gauge"])
    assert command.config.reduction == ReductionConfig(kind="invariant", lr=0.2) and not command.config.log_gauge


def test_settings_that_cannot_be_together_end_in_one_sentence(capsys):
    try:
        status = main(["train", "--breaking.enabled", "--reduction.kind", "chart"])
    except SystemExit as stopped:  # of the parser
        status = stopped.code
    assert status == 2
    captured = capsys.readouterr()
    assert "choose breaking or" in captured.err + captured.out and "Traceback" not in captured.err
    assert torch.get_num_threads() == 1
