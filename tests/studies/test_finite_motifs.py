"""The study of unseen motifs: labels by an independent check, who is invariant, dials, kept cells, the page."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from erlangen.finite import PermutationGroup, reverse_complement
from erlangen.finite.linear import EquivariantLinear
from erlangen.studies import _jobs, tour_finite
from erlangen.studies import finite_motifs as study
from erlangen.studies._training import seeded
from erlangen.studies.finite_motifs import arms, results, tasks
from erlangen.studies.finite_motifs.study import LEARNING_RATES, SCANNED, declared_jobs, kept_cells

pytestmark = pytest.mark.xdist_group("motifs")  # the run below is worth sharing
COMPLEMENT = str.maketrans("ACGT", "TGCA")
MIDDLE = slice(tasks.LENGTH // 2 - tasks.ARM, tasks.LENGTH // 2 + tasks.ARM)


def reverse_complemented(text):
    return text[::-1].translate(COMPLEMENT)


def matches(text):
    """How many of the pairs about the centre of the planted letters are complementary, letter by letter."""
    planted = text[MIDDLE]
    return sum(a == b.translate(COMPLEMENT) for a, b in zip(planted[: tasks.ARM], reversed(planted)))


def test_the_other_strand_is_the_groups():
    tokens = torch.randint(4, (5, tasks.LENGTH), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tasks.other_strand(tokens), reverse_complement(tasks.LENGTH).act_on_tokens(1, tokens))
    assert [tasks.spell(row) for row in tasks.other_strand(tokens)] == [
        reverse_complemented(tasks.spell(row)) for row in tokens
    ]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_no_unseen_motif_is_seen_nor_nearly(task):
    for seed in range(3):
        seen, unseen = tasks.motif_sets(task, torch.Generator().manual_seed(seed))
        assert (len(seen), len(unseen)) == (tasks.NUM_SEEN, tasks.NUM_UNSEEN)
        seen, unseen = ([tasks.spell(motif) for motif in motifs] for motifs in (seen, unseen))
        assert len({*seen, *unseen}) == tasks.NUM_SEEN + tasks.NUM_UNSEEN
        distances = [sum(a != b for a, b in zip(one, other)) for one in unseen for other in seen]
        assert min(distances) >= tasks.MIN_DISTANCE


def test_palindromes_are_palindromes_and_decoys_have_their_letters(generator):
    motifs, _ = tasks.motif_sets("palindrome", generator)
    arms_known = {tasks.spell(motif) for motif in motifs}
    tokens, labels = tasks.random_windows("palindrome", motifs, 400, generator, noise=0.0)
    turned = 0
    for text, label in zip(map(tasks.spell, tokens), labels.tolist()):
        left, right = text[MIDDLE][: tasks.ARM], text[MIDDLE][tasks.ARM :]
        if label:
            assert matches(text) == tasks.ARM and reverse_complemented(text[MIDDLE]) == text[MIDDLE]
            assert left in arms_known
        else:
            assert matches(text) <= tasks.ARM - tasks.MIN_MISMATCHES
            assert sorted(left) == sorted(reverse_complemented(right)), "the composition is the same"
            turned += left not in arms_known
            assert left in arms_known or reverse_complemented(right) in arms_known
    assert 60 < turned < 140, "half of the decoys are read from the other strand"
    noisy, labels = tasks.random_windows("palindrome", motifs, 2000, generator)
    share = sum(matches(tasks.spell(row)) for row in noisy[labels == 1]) / (1000 * tasks.ARM)
    both_kept, both_changed = 0.95**2, 0.05**2 / 3
    assert share == pytest.approx(both_kept + both_changed, abs=0.02)


def test_the_label_of_the_task_strand_is_the_strand(generator):
    data = tasks.random_data("strand", 4, train_size=200, test_size=50)
    tokens, labels = tasks.random_windows("strand", data.unseen_KA, 100, generator, noise=0.0)
    for text, label in zip(map(tasks.spell, tokens), labels.tolist()):
        strong = [letter in "CG" for letter in text[MIDDLE]]
        assert strong == [bool(label)] * tasks.ARM + [not label] * tasks.ARM
    for windows, labels in data.tests.values():
        assert torch.equal(windows[50:], tasks.other_strand(windows[:50])) and torch.equal(labels[50:], 1 - labels[:50])
    windows, labels = tasks.random_data("palindrome", 4, train_size=2, test_size=50).tests["unseen"]
    assert torch.equal(labels[50:], labels[:50])


@pytest.mark.parametrize("arm", arms.TRAINED)
def test_who_is_invariant(arm):
    group = reverse_complement(tasks.LENGTH)
    model = seeded(1, lambda: arms.build(arm)).double()
    tokens = torch.randint(4, (16, tasks.LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (model(tokens) - model(group.act_on_tokens(1, tokens))).abs().max()
    assert difference < 1e-12 if arm == "strict" else difference > 1e-3


def test_a_dial_at_zero_is_strict_and_one_with_the_same_weights_is_the_same_model():
    strict, dial = seeded(0, lambda: arms.build("strict")).double(), seeded(1, lambda: arms.build("dial")).double()
    layers = arms.dial_layers(dial)
    linears = {name: layer for name, layer in strict.named_modules() if isinstance(layer, EquivariantLinear)}
    assert layers.keys() == linears.keys() and len(layers) == 11
    for name, values in arms.dial_values(dial).items():
        assert values["gamma"] == 0.5 and values["share"] == pytest.approx(1 / 8, abs=0.04), name
    shared = {
        k: v for k, v in strict.state_dict().items() if k.rpartition(".")[0] not in layers and "weights." not in k
    }
    shared |= {k: v for k, v in strict.state_dict().items() if k.startswith("embedding")}
    dial.load_state_dict(shared, strict=False)
    tokens = torch.randint(4, (8, tasks.LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, layer in layers.items():
            layer.set_gamma(0.0)
            layer.weight += linears[name].weight_matrix() - layer.weight_and_bias()[0]
        torch.testing.assert_close(dial(tokens), strict(tokens), rtol=1e-10, atol=1e-10)
        layers["pool.pool.value"].set_gamma(1.0)
        layers["pool.pool.value"].weight.normal_(generator=torch.Generator().manual_seed(2))
        moved = dial(tasks.other_strand(tokens))
        assert (dial(tokens) - moved).abs().max() > 1e-3


def test_the_free_arm_is_a_plain_transformer_of_the_same_width():
    """Parameters counted by hand, and no symmetry of letters or positions in the vectors."""
    d, n, hidden = arms.DIM, tasks.LENGTH, arms.HIDDEN
    block = d * 3 * d + 3 * d + d * d + d + d * hidden + hidden + hidden * d + d + 2 * d
    heads = arms.NUM_HEADS
    pool = d * heads + heads + 2 * (d * d + d) + heads * n + d + 1
    free, strict = arms.build("free"), arms.build("strict")
    size = {name: sum(p.numel() for p in m.parameters()) for name, m in (("free", free), ("strict", strict))}
    assert size["free"] == 4 * d + n * d + arms.NUM_LAYERS * block + d + pool
    assert 0.5 <= size["strict"] / size["free"] < 0.51
    assert free.positions().shape == strict.positions().shape == (n, d)
    group = reverse_complement(n)
    features = strict.positions().detach()
    moved = group.permute(1, strict.embedding.representation.act(1, features), -2)
    torch.testing.assert_close(moved, features, msg="positions keep the vectors that they have")
    assert arms.build("free").blocks[0].group == PermutationGroup([range(n)])


def test_the_measures_by_hand():
    """A model that says the first letter minus 1.5: right, wrong and undecided windows, and both strands."""
    tokens = torch.zeros(4, 3, dtype=torch.long)
    tokens[:, 0] = torch.tensor([3, 3, 0, 2])
    labels = torch.tensor([1.0, 0.0, 1.0, 1.0])

    class First(torch.nn.Module):
        def forward(self, tokens):
            return tokens[:, 0] - 1.5

    found = arms.score(First(), (tokens, labels))
    logits = torch.tensor([1.5, 1.5, -1.5, 0.5])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert found["error"] == 0.5 and found["log_loss"] == pytest.approx(float(expected))
    assert found["invariance"] == pytest.approx((3.0 + 1.0) / 2) and found["flips"] == 0.5
    found = arms.score(First(), (tokens, labels), both=True)
    assert found["error"] == pytest.approx((0.5 + 0 + 0.5 + 0 + 1 - 0) / 4) and found["invariance"] == 0


@pytest.mark.parametrize("arm", ["strict", "post-hoc"])
def test_an_invariant_model_is_wrong_in_half_of_the_strands(arm):
    data = tasks.random_data("strand", 0, train_size=64, test_size=32)
    model = arms.train("strict" if arm == "strict" else "free", data.train, seed=0, steps=3, batch_size=8, lr=1e-2)
    model = model.double()
    for windows in data.tests.values():
        assert arms.score(model, windows, both=arm == "post-hoc")["error"] == 0.5


def test_training_learns_and_opens_and_closes_dials(generator):
    data = tasks.random_data("strand", 0, train_size=256, test_size=64)
    model = arms.train("free", data.train, seed=0, steps=60, batch_size=32, lr=1e-2)
    assert arms.score(model, data.tests["unseen"])["error"] < 0.1
    closed = arms.train("dial", data.train, seed=0, steps=12, batch_size=8, lr=1e-2, penalty=10.0)
    values = arms.dial_values(closed)
    assert max(v["share"] for v in values.values()) < 0.05 and all(0 <= v["gamma"] <= 1 for v in values.values())


@pytest.mark.parametrize("wrong", [{"tasks": ("x",)}, {"tasks": ()}, {"seeds": 0}, {"steps": 0}, {"workers": 0}])
def test_a_wrong_config_is_refused(wrong):
    with pytest.raises(ValueError):
        study.MotifConfig(**wrong)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A quick run of two tasks, stopped once and taken up again."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("motifs")
    config = replace(study.quick(folder / "out"), csv=folder / "csv")
    kept, seen = config.out / "cells.jsonl", []

    def stop(done, total):
        if len(kept.read_text().splitlines()) >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run(config, stop)
    assert not (config.out / "finite_motifs.html").exists()
    first = kept.read_text()
    path = study.run(config, lambda *counts: seen.append(counts))
    assert seen[0][0] > 1 and seen[-1] == (2 * 2 * 4 * config.steps,) * 2, "what was finished is not run again"
    assert kept.read_text().startswith(first)
    return config, path


def test_the_page_has_all_numbers(ran):
    config, path = ran
    page, data = path.read_text(), json.loads((config.out / "finite_motifs.json").read_text())
    assert [(r["task"], r["arm"], r["seed"]) for r in data["cells"]] == [
        (task, arm, seed) for task in tasks.TASKS for arm in arms.ARMS for seed in (0, 1)
    ]
    for record in data["cells"]:
        for test in results.TESTS:
            for number in record[test].values():
                assert f">{number:.4g}<".replace("-", "−") in page, (record["key"], number)
    for text in ("Task palindrome, unseen motifs.", "Task strand, unseen motifs.", "95 %", "<svg", "pool.pool.score"):
        assert text in page
    rows = {(r["task"], r["test"], r["first"], r["second"]): r for r in study.compare(config, data["cells"])}
    assert len(rows) == 2 * 2 * len(results.PAIRS)
    errors = {(r["task"], r["arm"], r["seed"]): r["unseen"]["error"] for r in data["cells"]}
    by_hand = sum(errors["palindrome", "dial", s] - errors["palindrome", "free", s] for s in (0, 1)) / 2
    assert rows["palindrome", "unseen", "dial", "free"]["interval"].mean == pytest.approx(by_hand)
    assert rows["strand", "unseen", "strict", "post-hoc"]["verdict"] == "no difference shown"
    for name in ("errors", "differences", "invariance", "costs", "dials", "cells"):
        assert (config.csv / f"finite_motifs_{name}.csv").stat().st_size > 100
    assert len((config.csv / "finite_motifs_cells.csv").read_text().splitlines()) == 1 + len(data["cells"])


def test_cells_are_taken_up_and_only_new_ones_run(ran, monkeypatch):
    config, _ = ran
    more = replace(config, tasks=("strand",), seeds=3)
    todo = [job.arguments[1:] for job in declared_jobs(more, kept_cells(more)) if not job.finished]
    assert todo == [("strand", arm, 2) for arm in arms.TRAINED], "only the new seed is run"
    monkeypatch.setattr(_jobs, "ProcessPoolExecutor", None)
    assert len(study.measure(replace(config, tasks=("strand",)))) == 2 * len(arms.ARMS)
    with pytest.raises(ValueError, match="other settings"):
        study.run(replace(config, steps=9))


def _write_dna(folder, seed):
    letters = random.Random(seed)
    (folder / "dna").mkdir()
    for label in ("positives", "negatives"):
        for split, count in (("train", 6), ("test", 3)):
            texts = ["".join(letters.choice("ACGT") for _ in range(60)) for _ in range(count)]
            texts += ["A" * 29 + "N" + "A" * 30, "ACGT"]  # left out: an unknown letter, and too short
            fasta = "".join(f">{i}\n{text}\n" for i, text in enumerate(texts))
            (folder / "dna" / f"nanog_{label}_{split}.fa").write_text(fasta)
    return folder / "dna"


def test_the_part_of_the_tour(ran, tmp_path, monkeypatch):
    config, _ = ran
    config = replace(config, tasks=(tour_finite.TASK,), csv=None)
    monkeypatch.setenv("ERLANGEN_DATA", str(tmp_path))
    assert tour_finite.dna_folder() is None
    records = tour_finite.measure(config)
    part = tour_finite.part(config, records)
    body = [str(item) for section in part.sections for item in section.body]
    assert any("real DNA is left out" in text for text in body) and "finite_dna" not in part.tables
    assert "strict against free: " in part.summary and len(part.tables["finite_seeds"].rows) == 2 * len(arms.ARMS)

    folder = _write_dna(tmp_path, 0)
    windows, labels = tour_finite.dna_windows(folder, "train")
    assert windows.shape == (12, tour_finite.DNA_LENGTH) and labels.tolist() == [0.0] * 6 + [1.0] * 6
    first = (folder / "nanog_negatives_train.fa").read_text().splitlines()[1]
    assert tasks.spell(windows[0]) == first[6:54]
    (audit, *_) = [job for job in tour_finite.declared_jobs(config, kept_cells(config)) if not job.finished]
    ticks = []
    found = audit.work(lambda step: bool(ticks.append(step)), *audit.arguments)
    assert ticks == list(range(1, audit.steps + 1)) and [r["arm"] for r in found] == ["strict", "free", "post-hoc"]
    page = tour_finite.part(config, [*records, *found])
    rows = {row[0]: row for row in page.tables["finite_dna"].rows}
    assert rows["strict"][3] < 1e-4 < rows["free"][3] and rows["post-hoc"][3] == 0


def test_the_declared_config_of_the_tour_is_a_case_of_the_study(tmp_path):
    steps = study.MotifConfig().steps
    config = tour_finite.declared_config(out=tmp_path, seeds=3, steps=steps)
    assert config == replace(study.MotifConfig(), out=tmp_path, tasks=("palindrome",), seeds=3)


def test_the_command_line_scans_each_declared_rate(tmp_path):
    sizes = "--steps 1 --batch-size 8 --train-size 16 --test-size 8 --workers 1 --scan-learning-rates"
    line = [sys.executable, "-W", "error", "-m", "erlangen.studies.finite_motifs", *sizes.split(), "--out", tmp_path]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    path = tmp_path / "finite_motifs_learning_rates.csv"
    assert result.stdout.splitlines()[-1] == str(path)
    rows = path.read_text().splitlines()
    assert rows[0].startswith("task,arm,seed,lr,")
    tried = [(row.split(",")[1], float(row.split(",")[3])) for row in rows[1:]]
    assert tried == [(arm, rate) for arm in arms.TRAINED for rate in SCANNED]
    assert all(LEARNING_RATES[arm] in SCANNED for arm in arms.TRAINED)
