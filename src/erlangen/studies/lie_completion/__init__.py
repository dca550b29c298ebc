"""Completing sequences of group elements: closed-form scores, a learned kernel on the same invariant, and vectors.

Protocol, fixed before the runs it reports:

- Groups: SE(2), SO(3), Aff(2), as in "Lie-Algebra Attention" (arXiv 2606.20547), and SE(3), Aff(3), which it left out.
- Task "sequence", the paper's: nine elements g_k = g_0 exp(k ξ), ‖ξ‖ uniform in [0.2, 0.4] (Frobenius norm of its
  matrix), direction uniform; one interior element is taken out and the rest is permuted. Find the missing one.
- Task "mixture", which no formula solves: two such sequences of seven with different ξ and starts, steps that vary by
  up to 30 %, noise of 0.02 a coordinate on every given element, an interior element missing in each, two random
  elements as distractors; all permuted. Find either of the missing ones.
- Arms. "formula": nothing learned; of all pairs it takes the one with the clearest hole half way and an element one
  step on, and answers with the midpoint g_i exp(½ w_ij). "closed form": attention with scores −‖w_ij‖²_λ / τ, λ and τ
  learned. "learned kernel": scores by a perceptron of 32 hidden units a head on w_ij = log(g_i⁻¹ g_j). "vectors": a
  transformer of two layers, width 32, on flattened matrices. The middle two share all else: four heads, one layer,
  token i proposes g_i exp(Σ_h C_h u_ih + f(u_i, s_i)) and says how sure it is, where u_ih = Σ_j α_ijh w_ij, s_i are
  averages of squared block norms with the same weights, and f is a perceptron of 64 hidden units. In the last arm token
  i proposes G_i + Δ_i. The answer is the proposal of the surest token, projected to the group where need be.
- Training: the same for all learned arms: 1024 sequences, Adam, 600 steps of 32, cosine schedule; loss
  Σ_i β_i min ‖log(ĝ_i⁻¹ g*)‖ over the missing elements, β the softmax of the confidences, to first order: the
  difference of tangent vectors at g_i for the middle two, ‖g*⁻¹ ĝ_i − 1‖_F for the vectors, whose proposals need not
  have a logarithm. Where a sequence lies in the group is drawn afresh on every step: the vectors need it, the others
  do not see it. One learning rate an arm, the best of three on the task "sequence" on SE(2), with 800
  steps and a seed the study does not use (`scan`).
- Measure: ‖log(ĝ⁻¹ g*)‖ to the nearest missing element on 128 fixed test sequences: their median, and their mean with
  errors cut at 10, which is also the error of an answer outside the group or the chart of its logarithm.
- Seeds 0 to 4; a seed sets initial weights, order and places; training and test sequences are the same for all. Rule:
  the mean over seeds of the paired difference of medians with its 95 % Student interval; a difference is called only
  where the interval leaves out zero.
- Beside it: parameters of the scores; how far an answer is from moving along when all elements are moved by h
  (‖(h out(g))⁻¹ out(h g) − 1‖_F, translations of 1000, scales of 100 and 1/100, in float32 and float64, 64 sequences);
  and the cocycle g_ik = g_ij g_jk, on the group and on logarithms.

Shape suffixes: B sequences, N given elements, T missing elements, H heads, G dimension of the algebra, K its blocks, m
size of the group's matrices (written twice).
"""

from .results import compare as compare
from .results import run as run
from .results import tables as tables
from .study import CompletionConfig as CompletionConfig
from .study import declared_jobs as declared_jobs
from .study import kept_cells as kept_cells
from .study import measure as measure
from .study import quick as quick
from .study import scan as scan
