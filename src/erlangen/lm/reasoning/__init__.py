"""Does a language model reason? Eight families of questions made from a seed, asked by likelihood.

The families are those of the fourteen prompts published with arXiv 2601.22257 (numeric and alphabetic patterns, near
and far retrieval, simple inference, copy) and its two families of pairs (negation, syntax). What differs: hundreds of
items a family rather than two, a closed choice with a level of chance, an ambiguity rule, questions that fit the
tokenizer and the context, intervals over items, and item-by-item comparison of two models.

- `Item`: a prompt, its candidates, the place of the right one. `make_items` draws a family from a seed.
- `Reader`: a tokenizer and a context; which items it can read. `make_suite` draws items that all readers can.
- `score` asks a model; `evaluate` does all of it. A model chooses the candidate whose text has the highest likelihood.
- `summarise`, `compare`: accuracies with bootstrap intervals, and paired differences of two models.
- `contamination`: which items stand in a text already.
- `write_harness_tasks`: the same items as tasks of lm-evaluation-harness.

Items that are made together, such as a minimal pair and its mirror image, are a block: in a block every candidate is
right as often as any other, so that what ignores the question scores at chance; and blocks, not items, are resampled.
"""

from .contamination import Contamination as Contamination
from .contamination import contamination as contamination
from .harness import write_harness_tasks as write_harness_tasks
from .items import FAMILIES as FAMILIES
from .items import Item as Item
from .items import make_items as make_items
from .results import Answer as Answer
from .results import Comparison as Comparison
from .results import FamilyResult as FamilyResult
from .results import Summary as Summary
from .results import compare as compare
from .results import macro as macro
from .results import summarise as summarise
from .scoring import FamilyItems as FamilyItems
from .scoring import Reader as Reader
from .scoring import adapt_tokenizer as adapt_tokenizer
from .scoring import beginning_of as beginning_of
from .scoring import evaluate as evaluate
from .scoring import make_suite as make_suite
from .scoring import next_logits as next_logits
from .scoring import score as score
