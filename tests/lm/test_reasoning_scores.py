"""Scores, statistics, tokenizers, contamination and the harness's tasks of the reasoning suite."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from erlangen.lm import GPT, GPTConfig, load_tokenizer, reasoning
from erlangen.lm.reasoning import Answer, FamilyItems, FamilyResult, Item, Reader
from erlangen.lm.reasoning.results import bootstrap, credit, mcnemar

BYTES = load_tokenizer("bytes")


class Oracle(nn.Module):
    """Knows the texts: after any beginning of one it bets on its next byte."""

    def __init__(self, texts):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.next = {text[:place]: text[place] for text in map(str.encode, texts) for place in range(1, len(text))}

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, 256, dtype=torch.float64)
        for row, text in enumerate(tokens.tolist()):
            for place in range(len(text)):
                following = self.next.get(bytes(text[: place + 1]))
                if following is not None:
                    logits[row, place, following] = 20.0
        return SimpleNamespace(logits=logits)  # as models of transformers return them


class Constant(nn.Module):
    """The same logits whatever the text: all equal, or drawn once."""

    def __init__(self, std):
        super().__init__()
        logits = std * torch.randn(256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.logits = nn.Parameter(logits)

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, 256), None


@pytest.fixture(scope="module")
def suite():
    return {asked.family: asked for asked in reasoning.make_suite([Reader(BYTES, 256)], num_items=80)}


@pytest.fixture(scope="module")
def gpt():
    config = GPTConfig(vocab_size=256, context_length=256, num_layers=2, num_heads=2, dim=16)
    model = GPT(config, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)  # away from the uniform distribution
    return model


def ask(model, asked, **options):
    return reasoning.score(model, Reader(BYTES, 256), asked, **options)


def test_a_model_that_knows_the_answers_has_them_all_right(suite):
    for family, asked in suite.items():
        found = reasoning.summarise(ask(Oracle([item.text for item in asked.items]), asked))
        assert found.accuracy == (1, 1, 1) and found.top1 == found.accuracy_a_byte == 1 and found.loss < 1e-4, family


def test_a_model_that_knows_wrong_answers_has_none(suite):
    for family in ("near", "inference", "syntax"):  # a pattern may begin with the whole of another
        asked = suite[family]
        texts = [item.prompt + item.candidates[item.answer - 1] for item in asked.items]
        assert not ask(Oracle(texts), asked).credits.any()


def test_what_cannot_choose_scores_chance_exactly(suite):
    """A tie is shared: else the place of the answer among the candidates would decide."""
    for family, asked in suite.items():
        result = ask(Constant(0.0), asked)
        if family != "syntax":
            assert result.credits == pytest.approx([item.chance for item in asked.items])
        assert result.credits.mean() == pytest.approx(result.chance), family
        assert result.losses[0] == pytest.approx(math.log(256) * len(asked.items[0].candidates[asked.items[0].answer]))


def test_what_ignores_the_prompt_scores_chance(suite):
    """Exactly in pairs; within the interval of four standard errors elsewhere."""
    for family, asked in suite.items():
        result = ask(Constant(1.0), asked)
        error = sum(item.chance * (1 - item.chance) for item in asked.items) ** 0.5 / len(asked.items)
        allowed = 1e-12 if family in ("negation", "syntax") else 4 * error
        assert abs(result.credits.mean() - result.chance) <= allowed, family


@pytest.mark.parametrize("family", ["numeric", "syntax"])
def test_batches_do_not_change_scores(suite, gpt, family):
    """Against the plain sum over the whole text, one text at a time, without filling; nothing but rounding differs."""
    asked = replace(suite[family], items=suite[family].items[:12])
    batched, alone = ask(gpt, asked, batch_size=64), ask(gpt, asked, batch_size=1)
    for item, one, other in zip(asked.items, batched.answers, alone.answers):
        plain = []
        for candidate in item.candidates:
            text = torch.tensor(list((item.prompt + candidate).encode()))[None]
            chosen = gpt(text[:, :-1])[0].log_softmax(-1)[0].gather(1, text[0, 1:, None])
            plain.append(chosen[len(item.prompt) - 1 :].sum().item())
        assert one.likelihoods == pytest.approx(plain, abs=1e-10, rel=0)
        assert other.likelihoods == pytest.approx(plain, abs=1e-10, rel=0) and one.greedy == other.greedy
    assert not gpt.training or gpt.train() is gpt


def test_evaluate_reads_the_context_from_the_model(gpt):
    results = reasoning.evaluate(gpt, BYTES, families=["far", "copy"], num_items=20)
    assert list(results) == ["far", "copy"] and results["far"].longest <= 256 and results["far"].too_long > 0
    mean = reasoning.macro(results)
    assert mean.accuracy.mean == pytest.approx(np.mean([result.credits.mean() for result in results.values()]))
    with pytest.raises(ValueError, match="pass context_length"):
        reasoning.evaluate(Constant(1.0), BYTES)
    with pytest.raises(ValueError, match="make the items for this reader"):
        asked = FamilyItems("far", results["far"].items, 0)
        reasoning.score(gpt, Reader(BYTES, 40), asked)


def test_likelihoods_that_are_no_numbers_are_no_score(suite):
    model = Constant(0.0)
    with torch.no_grad():
        model.logits[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        ask(model, replace(suite["copy"], items=suite["copy"].items[:2]))


# Tokenizers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that trains a BPE tokenizer on texts, and saves it."""
    tokenizers = pytest.importorskip("tokenizers", reason="BPE needs tokenizers: pip install 'erlangen[data]'")

    def make(texts, alphabet):
        made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None if alphabet else "[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400, show_progress=False, special_tokens=["[UNK]"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        )  # fmt: skip
        made.train_from_iterator(texts, trainer)
        path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        made.save(str(path))
        return load_tokenizer(str(path))

    return make


def test_boundaries_of_merged_tokens(trained):
    texts = [item.text for family in ("near", "numeric", "negation") for item in reasoning.make_items(family, 60)[0]]
    tokenizer = trained(texts, True)
    reader = Reader(tokenizer, 128, beginning=0)
    merged = 0
    for asked in reasoning.make_suite([reader, Reader(BYTES, 128)], num_items=40):
        for item in asked.items:
            encoded = reader.encode(item)
            for text, candidate in zip(encoded.texts, item.candidates):
                assert text[0] == 0 and tokenizer.decode(text[1:]) == item.prompt + candidate
                assert text[: encoded.start] == encoded.texts[0][: encoded.start]
                assert (item.prompt + candidate).startswith(tokenizer.decode(text[1 : encoded.start]))
                assert len(tokenizer.decode(text[1 : encoded.start])) <= len(item.prompt)
            merged += max(map(len, encoded.texts)) < len(item.text)
    assert merged > 100, "tokens of several letters were met"


def test_symbols_a_tokenizer_lacks_are_named(trained):
    letters = trained(["Dax has the coin. Every wug is a tov, and the old cat ran."] * 3, False)
    with pytest.raises(ValueError, match=r"'numeric' needs: .*\d"):
        reasoning.make_suite([Reader(letters, 128)], families=["numeric"], num_items=5)


# Statistics


def result_of(credits, blocks=None, family="made up"):
    """A result with these items right; two candidates each."""
    blocks = range(len(credits)) if blocks is None else blocks
    items = tuple(
        Item(family=family, kind="", prompt=f"{number}", candidates=(" a", " b"), answer=0, block=block)
        for number, block in enumerate(blocks)
    )
    return FamilyResult(family, items, tuple(Answer((0.0, 1.0 - 2.0 * right), False) for right in credits))


def test_the_bootstrap_has_the_spread_of_a_mean():
    credits = (np.arange(400) % 4 == 0).astype(float)
    alone = reasoning.summarise(result_of(credits))
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert alone.accuracy.mean == 0.25 and alone.chance == 0.5
    assert alone.accuracy.low == pytest.approx(0.25 - half, abs=0.006)
    assert alone.accuracy.high == pytest.approx(0.25 + half, abs=0.006)
    assert reasoning.summarise(result_of(credits)) == alone, "the seed decides"
    # Four copies of each item in a block tell no more than one: the deviation is twice that of 400 single items.
    copies = bootstrap(np.repeat(credits[:100], 4), np.repeat(np.arange(100), 4)).std()
    assert copies == pytest.approx(math.sqrt(0.25 * 0.75 / 100), rel=0.06)
    # A choice that ignores the prompt is right once in every pair: no spread at all.
    assert bootstrap(np.tile([1.0, 0.0], 50), np.repeat(np.arange(50), 2)).std() == 0


def test_the_interval_covers():
    """Of 200 intervals for a known accuracy 95 % hold it: 190 ± 3 deviations of a binomial."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        values = (rng.random(150) < 0.4).astype(float)
        low, high = np.quantile(bootstrap(values, np.arange(150), seed=seed, resamples=500), [0.025, 0.975])
        held += low <= 0.4 <= high
    assert 190 - 3 * math.sqrt(200 * 0.05 * 0.95) <= held <= 199


def test_mcnemar_is_the_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    for better, worse in [(0, 0), (1, 0), (5, 5), (3, 11), (40, 17), (0, 9)]:
        expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
        assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-12)


def test_two_models_are_compared_on_the_same_items():
    rng = np.random.default_rng(1)
    first = (rng.random(300) < 0.5).astype(float)
    second = np.where(rng.random(300) < 0.2, 1.0, first)  # a fifth of the items made right
    one, mean = reasoning.compare({"a": result_of(first)}, {"a": result_of(second)})
    assert one.difference.mean == pytest.approx((second - first).mean()) and one.worse == 0
    assert one.better == (second > first).sum() and one.p == mcnemar(one.better, 0) < 1e-6
    assert one.difference.low > 0 and mean.difference == one.difference and math.isnan(mean.p)
    (same, _) = reasoning.compare({"a": result_of(first)}, {"a": result_of(first)})
    assert same.difference == (0, 0, 0) and same.p == 1
    with pytest.raises(ValueError, match="different items"):
        reasoning.compare({"a": result_of(first)}, {"a": result_of(first[:-1])})


def test_ties_are_shared():
    assert credit([1.0, 2.0, 2.0], 1) == 0.5 and credit([1.0, 2.0, 2.0], 0) == 0 and credit([3.0, 3.0, 3.0], 2) == 1 / 3


def test_contamination_is_found_whatever_the_spacing(suite):
    items = suite["numeric"].items[:20] + suite["far"].items[:10]
    tail = items[25].text.split(". ", 1)[1]  # less its first sentence
    text = ["once upon", f"x {items[3].text.replace(', ', ' ,').upper()}, and", f"said. {tail} and"]
    found = reasoning.contamination(items, text)
    assert found.full == tuple(place == 3 for place in range(30))
    assert found.end == tuple(place in (3, 25) for place in range(30))
    assert not any(reasoning.contamination(items, items[3].prompt).end), "the answer is wanted too"


# Tasks of lm-evaluation-harness


def test_tasks_are_written(tmp_path):
    files = reasoning.write_harness_tasks(tmp_path / "tasks", families=["copy", "syntax"], num_items=10)
    assert {path.name for path in files} == {
        "items.py", "copy.jsonl", "copy.yaml", "syntax.jsonl", "syntax.yaml", "erlangen_reasoning.yaml"
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "tasks" / "copy.jsonl").read_text().splitlines()]
    items = reasoning.make_items("copy", 10)[0]
    assert [(line["prompt"], line["answer"]) for line in lines] == [(item.prompt, item.answer) for item in items]
    reasoning.write_harness_tasks(tmp_path / "tasks", families=["copy"], num_items=10)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        reasoning.write_harness_tasks(tmp_path / "other")


@pytest.mark.filterwarnings("ignore")  # those of its many libraries
def test_the_harness_agrees_item_by_item(tmp_path, gpt):
    pytest.importorskip("lm_eval", reason="tasks are run where lm-evaluation-harness is: pip install 'erlangen[eval]'")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    class Bytes(TemplateLM):
        """The harness's own way to encode and to ask, over our model and its bytes."""

        eot_token_id = 0

        def tok_encode(self, string, **_):
            return list(string.encode())

        def _loglikelihood_tokens(self, requests, **_):
            found = []
            for _, context, continuation in requests:
                text = torch.tensor([*context, *continuation])[None]
                chosen = gpt(text[:, :-1])[0].log_softmax(-1)[0].gather(1, text[0, 1:, None])[len(context) - 1 :]
                found.append((chosen.sum().item(), False))
            return found

        def loglikelihood_rolling(self, requests, **_):
            raise NotImplementedError

        def generate_until(self, requests, **_):
            raise NotImplementedError

    families = ["near", "syntax"]
    reasoning.write_harness_tasks(tmp_path / "tasks", families=families, num_items=12, most_bytes=256)
    with torch.no_grad():
        theirs = simple_evaluate(
            Bytes(), tasks=["erlangen_reasoning"], log_samples=True, bootstrap_iters=10,
            task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        )  # fmt: skip
    ours = reasoning.evaluate(gpt, BYTES, families=families, num_items=12)
    for family, result in ours.items():
        samples = sorted(theirs["samples"][f"erlangen_reasoning_{family}"], key=lambda sample: sample["doc_id"])
        assert [sample["acc"] for sample in samples] == result.credits.tolist()
        for sample, answer in zip(samples, result.answers):
            assert [value[0] for value in sample["filtered_resps"]] == pytest.approx(answer.likelihoods, abs=1e-9)
