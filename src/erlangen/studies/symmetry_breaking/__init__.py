"""What unlearned biases break, what they do under which optimiser, and what one validation batch says of that.

The method of "Symmetry Breaking in Transformers" (arXiv 2601.22257) adds to the queries of each layer a vector that is
not learned: a fixed mean (0.5 in every coordinate) and a noise drawn on every forward (deviation 0.05 to 0.15 over the
coordinates of a head); and to the values a noise (0.05; we take their mean to be 0, which is one of the published
settings). The released models have learned biases in attention too. Three parts, fixed before any run of them.

Shared by all parts:

- Model and text: 2 layers, 4 heads, width 64, context 64, learned positions, GELU, tied tables; the Python standard
  library's source as bytes, a tenth or so of its files held out. 240 steps of 16 windows, 5 % warm-up, cosine schedule
  to a tenth of the rate, no clipping, float32.
- Optimisers: AdamW, whose β₂ has the half-life of 0.95 at 491,520 tokens a step, 6.6 million tokens (the rule of Marek
  et al., arXiv 2507.07101: 0.95 to the power of tokens a step / 491,520; here 0.99989, so that in these short runs it
  is nearly the mean of all squared gradients); AdamW with β₂ = 0.95 besides; SGD with momentum 0.95 (not Nesterov's),
  from rest, and with a random initial velocity of deviation 0.1, as published; SOAP; Muon; ECD (η = 100, F0 = 0, ν = 0)
  with the published Euler kick and with the exact one, both with the product over all parameters. The published F0 = 2
  lies above losses that bytes reach, and its product of each tensor by itself makes charges of its own. The rest are
  the defaults of `erlangen.optim`, weight decay of matrices among them: none for SGD and ECD.
- Learning rate: of each case the best of three, a factor of about 3 apart, the same three for all cells of an optimiser
  (`arms.SIZES`): lowest held-out loss at the last step on seed 1000, which is not used again. So each case has the same
  budget. A winner at the edge of its grid is reported as such.
- Then seeds 0 to 4 at the chosen rates. A seed sets initial weights, order of the data, draws and the random velocity,
  so that two cases of one seed form a pair. A case that two parts have is run once, and is the same numbers in both.
- Measure: loss at the last step on 480 fixed held-out windows, with the mean of the biases. A run that could not go on
  has an infinite one; comparisons with such a case are reported, and not made.
- Rule: a comparison is the mean over seeds of the paired difference with its 95 % Student interval. A difference is
  called where Holm's procedure over all comparisons of its part rejects zero at 5 %; an interval that leaves out zero
  without that is a hint, of which one or two a part come by chance; anything else is "no difference shown", which does
  not say that there is none.

What breaks what ("what-breaks"): learned biases of attention × mean × noise, under AdamW, SGD from rest, SOAP, Muon and
ECD with the Euler kick: 40 cases. A cell is named "biased" or "bare" by its learned biases, and "none", "mean", "noise"
or "both" by its unlearned ones.

- Charges at the last step (`erlangen.gauge.charges`): zero if at most 1e-5 in every head of every seed, broken if their
  mean over heads is at least 1e-3 in every seed, else between. Predicted, for SGD from rest and ECD: no bias, all zero;
  mean, the charge of queries and keys broken and that of values and output zero; noise or both, both broken. The affine
  charge, which is that of W and learned + fixed bias, is zero under the mean alone and broken under noise: beside
  learned biases the mean breaks nothing. Bare, there is no affine charge, and the mean breaks what moves it. For AdamW,
  SOAP and Muon no charge is predicted (Muon's biases are AdamW's, and its momentum looks ahead).
- Predicted for all five: a fixed mean beside learned biases makes the same losses as a learned query bias that starts
  at 0.5. Checked over 40 steps in float64, beside the difference from a bias that starts at 0.
- Loss, for each optimiser: the main effects of learned biases, mean and noise (four cells less four), and biased-noise,
  biased-mean and biased-both (published) less biased-none, and bare-both less bare-none. 35 comparisons.

Optimisers ("optimizers"): all eight, biased-none (plain) and biased-both (broken): 16 cases.

- Of each the loss with its interval, floats of state a parameter (counted in the optimiser's state), and the time of a
  step: one thread, alone, each case in turn in each of 30 rounds, in an order drawn anew; median, 20 and 80 %.
- Compared: broken less plain (8); the gap to AdamW when both are plain and when both are broken (14), and the change of
  that gap (7): the claim is that breaking closes it, so that the change is below zero. 29 comparisons.

One batch ("one-batch"): the published number of a run is the lowest of its validations, each on one batch, the next one
each time. AdamW and ECD with the Euler kick, plain and broken: the runs of the part before, which validate 60 times and
log the loss of every window. A batch is 8 windows, validation t has batch t of the fixed set.

- Of each run: which validation is the lowest, and by how much its batch is easier than the whole set.
- Of pairs of runs, the difference of the lowest one-batch losses beside that of the whole set at the end: broken less
  plain, ECD less AdamW, and, as the null, any two seeds of one case. Their deviations over pairs; how often a single
  one lies outside of the interval of the whole set, or has not its sign; the deviation from batch to batch at the
  end.
- No test: the part describes how far the published statistic is from what it stands for. Differences from the published
  protocol: the windows of a batch are spread over some files and not neighbours, so that batches are more alike than
  the published ones; a batch has 512 tokens and not 4,096; biases are at their mean in validation and not at the last
  draw; the rate decays.

Before the study: single runs of seed 2000, to time a step and to place the grids ("biased-none" only, so that the grids
suit that cell, if any). They also showed, at one rate of SGD and ECD, charges of 1e-7 where they are predicted to be
zero and of 1e-2 and more elsewhere, which the limits above are chosen by; and that AdamW is 0.03 worse at the rule's β₂
than at 0.95, for which that one was added.

Sizes: two workers of one thread each take about 40 minutes of an idle machine of two cores. Parts run in the order
optimisers, one batch, what breaks what, and the report is written after each.

On a GPU, ``--size 124m``: the published recipe, `erlangen.lm.run_preset("symmetry-breaking-124m")`, its model, data and
their order, batch, steps, constant rate, precision and settings of each optimiser, with the cells switched on it, grids
of its own, and validation on 976 fixed windows, of which the published number is computed as above. There F0 = 2, the
product of each tensor by itself, Nesterov's momentum and weight decay of biases are as published, so that charges are
predicted to be zero up to what these make.
"""

from .results import run as run
from .study import SymmetryBreakingConfig as SymmetryBreakingConfig
from .study import measure as measure
from .study import quick as quick
from .study import tune as tune
