"""Is it better to break the symmetry of attention heads, or to quotient it out?

Queries and keys of a head, and its values and output, can be moved together by any invertible matrix without a change
to what a transformer computes. One paper breaks this redundancy with unlearned biases and reports that simple
optimisers gain; another proposes to train without it and leaves the experiments open. Protocol, fixed before any run
of it:

- Model and text: 2 layers, 4 heads, width 64, context 64, learned positions, tied tables, and no biases in attention
  (beside a learned bias a fixed mean breaks nothing); the Python standard library's source as bytes, a tenth or so of
  its files held out. 400 steps of 16 windows, 5 % warm-up, cosine schedule to a tenth of the rate, no clipping,
  float32.
- Arms. "plain". Broken: "noise", biases of queries (deviation 0.05 to 0.15 over the coordinates of a head) and of
  values (0.05) with mean zero, drawn on every forward; "mean", a constant 0.5 on all coordinates of the queries.
  These are the two parts of the published biases. In evaluation the mean is used: none for "noise". A fixed mean
  leaves the moves that keep that vector, and "mean" has none of values: it breaks k of the k² directions of each
  head's queries and keys. Reduced: "horizontal" (`erlangen.gauge.horizontal`: of each step the part along the gauge is
  taken out), "dressed" (`dressed`: heads are brought to balanced form at the start and after every tenth step, the
  optimiser's state along with them), "invariant" (`QuotientSGD`: the heads by descent with momentum 0.9 under a metric
  that no gauge changes, without weight decay; the optimiser has everything else).
- Optimisers: SGD with momentum, ECD with the exact kick, ECD with the published Euler kick, AdamW, SOAP, Muon, each
  with the defaults of `erlangen.optim`, weight decay among them. 6 arms times 6 optimisers are 36 cases.
- Learning rate: of each case the best of three, a factor of about 3 apart, the same three for all arms of an optimiser
  (`arms.SIZES`): lowest held-out loss at the last step on seed 1000, which is not used again. So each case has the same
  budget. A winner at the edge of its grid is reported as such. The heads of "invariant" have a rate of their own, the
  same in all its cases: 0.03.
- Then seeds 0 to 4 at the chosen rates. A seed sets initial weights, order of the data and draws, so that two cases of
  one seed form a pair.
- Measure: loss at the last step on 256 fixed held-out windows. A run that could not go on (its loss was not finite)
  has an infinite one; a case with such a run is reported, and not compared.
- Rule: within each optimiser, every other arm against "plain", and "noise" against "horizontal", "dressed" and
  "invariant": 48 comparisons, each the mean over seeds of the paired difference with its 95 % Student interval. A
  difference is called where Holm's procedure over all 48 rejects zero at 5 %; an interval that leaves out zero without
  that is called a hint, of which two or three come by chance. Optimisers are not compared with each other.
- Also kept: at eight steps, the share of the step that lies along the gauge, the drift of the charges, and how far the
  heads are from the start, up to gauge and as stored (`erlangen.gauge.GaugeMonitor`); time of a step.
- Before the study: single runs of seed 2000, to time a step, to place the grids (four rates of each optimiser, "plain"
  only, so that the grids suit that arm, if any; the best is the middle), and for the rate of the heads of "invariant":
  under AdamW 0.03 was better than 0.01 and 0.003, and at 0.1 and 0.3 the loss was soon not finite; SGD with momentum
  preferred 0.03 to 0.1, and Muon to 0.01; the others were run at 0.03 only.

The same at the shape of GPT-2 small, on a GPU: ``--size 124m``, 12 layers, context 1024, FineWeb-Edu through GPT-2's
tokens, 2000 steps of 64 windows, bfloat16, with grids of its own.
"""

from .results import compare as compare
from .results import run as run
from .results import tables as tables
from .study import BreakOrReduceConfig as BreakOrReduceConfig
from .study import measure as measure
from .study import quick as quick
from .study import tune as tune
