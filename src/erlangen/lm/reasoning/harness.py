"""The suite as tasks of lm-evaluation-harness: a folder for its ``--include_path``.

A family is a task ``erlangen_reasoning_<family>`` of multiple choice, all together are the group
``erlangen_reasoning``, whose accuracy is the unweighted mean. The harness encodes prompt and candidate together and
scores the sum over the tokens after the prompt, as we do; it gives a tie to the first.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from .items import FAMILIES, Item, check_families, make_items

GROUP = "erlangen_reasoning"
MOST_BYTES = 1024
_LOADER = '''"""The items beside this file."""

import json
from pathlib import Path

import datasets


def load(file, **_):
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
'''
_TASK = """\
task: {task}
custom_dataset: !function items.load
dataset_kwargs:
  file: {family}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: candidates
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
_GROUP = """\
group: {group}
task:
{tasks}
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: false
metadata:
  version: 1.0
"""


def write_harness_tasks(
    folder: str | Path,
    *,
    families: Sequence[str] = FAMILIES,
    num_items: int = 500,
    seed: int = 0,
    most_bytes: int = MOST_BYTES,
) -> list[Path]:
    """Write the tasks; ``lm_eval --include_path FOLDER --tasks erlangen_reasoning`` takes them.

    Args:
        folder: created if needed; must be empty, or hold tasks written by this function.
        families: which.
        num_items: items a family, at least.
        seed: of the items.
        most_bytes: longest text of an item; a byte model needs a context of so many tokens.

    Returns:
        The files.

    Raises:
        ValueError: the folder holds something else, or as of `make_items`.
    """
    folder, families = Path(folder), check_families(tuple(families))
    if folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not (folder / f"{GROUP}.yaml").is_file())
    ):
        raise ValueError(f"{folder} holds something else: choose an empty folder")
    files = {"items.py": _LOADER}
    for family in families:
        items, _ = make_items(family, num_items, seed=seed, fits=lambda item: _bytes(item) <= most_bytes)
        lines = [json.dumps(_document(item), ensure_ascii=False) for item in items]
        files[f"{family}.jsonl"] = "\n".join(lines) + "\n"
        files[f"{family}.yaml"] = _TASK.format(task=f"{GROUP}_{family}", family=family)
    tasks = "\n".join(f"  - {GROUP}_{family}" for family in families)
    files[f"{GROUP}.yaml"] = _GROUP.format(group=GROUP, tasks=tasks)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def _bytes(item: Item) -> int:
    return max(len((item.prompt + end).encode()) for end in item.candidates)


def _document(item: Item) -> dict:
    return {
        "prompt": item.prompt, "candidates": list(item.candidates), "answer": item.answer, "kind": item.kind,
        "block": item.block,
    }  # fmt: skip
