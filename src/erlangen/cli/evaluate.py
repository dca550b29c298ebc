"""``erlangen evaluate``: the reasoning suite, on one model or on two."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import erlangen
from erlangen import lm, report
from erlangen.lm import reasoning
from erlangen.lm.reasoning import Answer, Contamination, FamilyItems, FamilyResult

from . import _evaluate_page as pages
from ._gauge_files import check_out, print_table, progress_bar, say, stdout
from ._language_model import LanguageModel, open_language_model

_DESCRIPTION = """\
Ask a language model hundreds of small questions with a known answer, and say how sure the score is.

  erlangen evaluate runs/mine                       a run of erlangen train
  erlangen evaluate gpt2                            a folder of Hugging Face, with its tokenizer
  erlangen evaluate runs/symmetric runs/broken      two models on the same questions, item by item
  erlangen evaluate runs/mine --corpus book.txt     which questions stand in the training text already
  erlangen evaluate --harness tasks                 the questions as tasks of lm-evaluation-harness:
                                                    lm_eval --include_path tasks --tasks erlangen_reasoning ...

Eight families: numeric and alphabetic patterns, near and far retrieval, simple inference, copy, negation, syntax. A
model chooses the candidate whose text it finds likeliest. Intervals are 95 % bootstrap intervals over items; the level
of chance stands beside. Prints tables, and writes evaluate.html and evaluate.json.

A checkpoint must hold every tensor of its model, the unlearned biases of a broken one included: else nothing is asked.

Ctrl-C keeps the families that are done, in evaluate.jsonl; the same command goes on from there.
"""

NAME = "evaluate"
_SUITE = 1  # raised when the items of a seed change


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `erlangen evaluate` is to ask."""

    model: Annotated[Path | None, tyro.conf.Positional] = None
    """A run of `erlangen train`, or a folder of a causal model of Hugging Face."""
    second: Annotated[Path | None, tyro.conf.Positional] = None
    """Another, to compare with the first."""
    families: tuple[str, ...] = reasoning.FAMILIES
    """Which families to ask."""
    items: int = 500
    """Questions a family, at least."""
    seed: int = 0
    """Of the questions and of the bootstrap."""
    corpus: str | None = None
    """Look for the questions in this text: a file, a folder, or whatever --data.corpus of `erlangen train` takes."""
    tokenizer: str | None = None
    """"bytes", "gpt2", a tokenizers JSON file or a folder of Hugging Face. None: the model's own."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""
    batch_size: int = 64
    """Sequences a forward, at most."""
    harness: Path | None = None
    """Write the questions as tasks of lm-evaluation-harness into this folder."""
    json: bool = False
    """Print the results as JSON, less the items, instead of tables."""
    out: Path = Path(NAME)
    """Folder for the results; those of an earlier call are replaced."""


@dataclass(frozen=True)
class Evaluated:
    """What one model answered."""

    name: str
    results: Mapping[str, FamilyResult]
    summaries: Sequence[reasoning.Summary]
    """Of each family, and of their mean."""


def main(arguments: Sequence[str]) -> int:
    """Evaluate; exit status 0, or 130 if stopped."""
    config = tyro.cli(EvaluateConfig, args=list(arguments), prog="erlangen evaluate", description=_DESCRIPTION)
    console = stdout()
    if config.harness is not None:
        reasoning.write_harness_tasks(
            config.harness, families=config.families, num_items=config.items, seed=config.seed
        )
        how = f"lm_eval --include_path {config.harness} --tasks erlangen_reasoning"
        say(console, f"the tasks are in {config.harness}; {how} takes them")
    if config.model is None:
        if config.harness is None:
            raise ValueError("name a run of erlangen train or a folder of a model, or --harness for the tasks alone")
        return 0
    check_out(config.out, NAME)
    paths = [config.model] if config.second is None else [config.model, config.second]
    models = [open_language_model(path, tokenizer=config.tokenizer, device=config.device) for path in paths]
    log = _Log(config.out / f"{NAME}.jsonl")
    answers: list[dict[str, FamilyResult]] = [{} for _ in models]
    readers = [model.reader for model in models]
    for family in config.families:
        (asked,) = reasoning.make_suite(readers, families=[family], num_items=config.items, seed=config.seed)
        try:
            for path, model, own in zip(paths, models, answers):
                key = _key(config, path, model, asked)
                own[family] = log.find(key, model, asked) or _ask(console, config, model, asked, log, key)
        except KeyboardInterrupt:
            kept = min(map(len, answers))
            print(
                f"erlangen evaluate: stopped; {kept} of {len(config.families)} families are in {log.path}, and the "
                "same command goes on",
                file=sys.stderr,
            )
            return 130
    evaluated = [
        Evaluated(model.name, own, [*(reasoning.summarise(result, seed=config.seed) for result in own.values()),
                                    reasoning.macro(own, seed=config.seed)])
        for model, own in zip(models, answers)
    ]  # fmt: skip
    compared = pages.paired(reasoning.compare(*answers, seed=config.seed)) if len(models) == 2 else None
    found = None if config.corpus is None else _look(config.corpus, models[0], evaluated[0])
    data = _data(config, models, evaluated, compared, found)
    page = pages.evaluate_page(evaluated, compared, found)
    path = report.write_report(config.out, NAME, page, data, {})
    if config.json:
        written = json.loads((config.out / f"{NAME}.json").read_text(encoding="utf-8"))
        print(json.dumps({name: value for name, value in written.items() if name != "items"}))
        return 0
    for one in evaluated:
        print_table(console, f"reasoning of {one.name}", *pages.family_rows(one, short=True))
    if compared is not None:
        print_table(console, f"{evaluated[1].name} less {evaluated[0].name}", *pages.paired_rows(compared, short=True))
    if found is not None:
        print_table(console, "questions found in the text", *pages.contamination_rows(evaluated, found))
    for line in pages.evaluate_summary(evaluated, compared):
        say(console, line)
    say(console, f"the report: {path}")
    return 0


def _ask(console: Any, config: EvaluateConfig, model: LanguageModel, asked: FamilyItems, log: "_Log", key: str):
    with progress_bar(console, f"{model.name}: {asked.family}") as progress:
        result = reasoning.score(model.model, model.reader, asked, batch_size=config.batch_size, progress=progress)
    log.write(key, model, result)
    return result


def _key(config: EvaluateConfig, path: Path, model: LanguageModel, asked: FamilyItems) -> str:
    """What the answers of a family depend on: the items, and the files and tokenizer of the model."""
    weights = [
        file
        for pattern in ("*.safetensors", "*.bin", "*.json", "step-*/*.safetensors", "step-*/checkpoint.json")
        for file in sorted(path.glob(pattern))
    ]
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights]
    texts = [(item.prompt, item.candidates, item.answer) for item in asked.items]
    parts = (_SUITE, str(path.resolve()), stamps, model.tokenizer.name, str(model.dtype), texts)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


class _Log:
    """Finished families, a line each; lines of other models and questions are left alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                    self._lines[record["key"]] = record
                except (ValueError, KeyError, TypeError):  # a line that was cut when the machine stopped
                    continue

    def find(self, key: str, model: LanguageModel, asked: FamilyItems) -> FamilyResult | None:
        """The result of this key, if it is there."""
        record = self._lines.get(key)
        if record is None or len(record["likelihoods"]) != len(asked.items):
            return None
        answers = (Answer(tuple(values), greedy) for values, greedy in zip(record["likelihoods"], record["greedy"]))
        return FamilyResult(
            asked.family, tuple(asked.items), tuple(answers), asked.too_long, record["shortest"], record["longest"]
        )

    def write(self, key: str, model: LanguageModel, result: FamilyResult) -> None:
        """Add a result."""
        record = {
            "key": key, "model": model.name, "family": result.family, "shortest": result.shortest,
            "longest": result.longest, "greedy": [answer.greedy for answer in result.answers],
            "likelihoods": [answer.likelihoods for answer in result.answers],
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut + json.dumps(record) + "\n")


def _look(corpus: str, model: LanguageModel, evaluated: Evaluated) -> dict[str, Contamination]:
    items = [item for result in evaluated.results.values() for item in result.items]
    found = reasoning.contamination(items, _texts(corpus, model))
    places: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        places.setdefault(item.family, []).append(number)
    return {
        family: Contamination(tuple(found.full[i] for i in numbers), tuple(found.end[i] for i in numbers))
        for family, numbers in places.items()
    }


def _texts(corpus: str, model: LanguageModel) -> Iterable[str]:
    """The texts of a corpus, training and validation."""
    if Path(corpus).is_file() and not corpus.endswith(".bin"):
        try:
            return [Path(corpus).read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--corpus {corpus} is not text in UTF-8 ({error.reason} at byte {error.start})"
            ) from error
    reading = model.tokenizer if ".bin" in corpus else lm.load_tokenizer("bytes")
    loaded = lm.load_corpus(corpus, reading)
    return (reading.decode(shard) for tokens in (loaded.train, loaded.validation) for shard in tokens.shards)


def _data(
    config: EvaluateConfig,
    models: Sequence[LanguageModel],
    evaluated: Sequence[Evaluated],
    compared: Sequence[pages.Paired] | None,
    found: Mapping[str, Contamination] | None,
) -> dict[str, Any]:
    data: dict[str, Any] = {"command": f"erlangen {NAME}", "version": erlangen.__version__, "suite": _SUITE}
    data |= {"config": vars(config) | {"families": list(config.families)}}
    data["models"] = [
        {
            "name": model.name, "tokenizer": model.tokenizer.name, "context_length": model.context_length,
            "beginning": model.beginning, "dtype": str(model.dtype).removeprefix("torch."),
            "summaries": [
                vars(summary) | {"accuracy": report.Interval(*summary.accuracy)} for summary in one.summaries
            ],
            "by_kind": pages.by_kind(one),
        }
        for model, one in zip(models, evaluated)
    ]  # fmt: skip
    data["asked"] = {
        family: {"items": len(result.items), "too_long": result.too_long, "shortest": result.shortest,
                 "longest": result.longest}
        for family, result in evaluated[0].results.items()
    }  # fmt: skip
    data["comparison"] = None if compared is None else [vars(row) for row in compared]
    data["contamination"] = None if found is None else pages.contamination_data(evaluated, found)
    data["items"] = list(_items(evaluated))
    return data


def _items(evaluated: Sequence[Evaluated]) -> Iterator[dict[str, Any]]:
    for family, result in evaluated[0].results.items():
        for number, item in enumerate(result.items):
            answers = [one.results[family].answers[number] for one in evaluated]
            yield {
                "family": family, "kind": item.kind, "block": item.block, "prompt": item.prompt,
                "candidates": item.candidates, "answer": item.answer, "parameters": item.parameters,
                "likelihoods": [answer.likelihoods for answer in answers],
                "greedy": [answer.greedy for answer in answers],
            }  # fmt: skip
