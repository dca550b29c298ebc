"""The loss between two language models: averaged as stored, and after alignment under more and more of their gauge.

Two models that were trained from different seeds do about as well, and their average does not: heads and neurons are in
another order, and the residual stream and each head have another frame. `erlangen.gauge.align` takes that away as far
as weights tell. How much of the loss in between goes with it? Protocol, fixed before any pair was merged:

- Text: tiny Shakespeare (1.1 MB) in characters, 65 of them; the first 90 % to train on, of the rest 256 evenly spaced
  windows of 64 characters to measure on.
- Families, both of width 128, two layers, four heads of 32, untied tables, float32. "gpt": `erlangen.lm.GPT`, learned
  positions, layer norms with biases, GELU (512 wide), biases. "llama": LlamaForCausalLM of transformers,
  rotary positions, RMS norms, SwiGLU (344 wide), two key/value heads, no biases.
- Training: 800 steps of 16 windows (0.8 epochs), AdamW (betas 0.9 and 0.99, weight decay 0.1 on matrices and tables),
  learning rate 0.003 with 5 % warm-up and a cosine to zero, gradients clipped to norm 1. A seed draws initial weights
  and the order of windows. Seeds 0 to 9 of each family; pair p is of the seeds 2p and 2p + 1: five pairs that share
  no model.
- Arms, models A and B at merge weights t = 0, 0.1, ..., 1. "naive": stored numbers averaged, (1 − t) A + t B.
  "permutation", "orthogonal", "gauge": `erlangen.gauge.merge(A, B, t, using=...)`. All look at weights only: no text is
  used to align. "permutation" matches the order of heads and neurons (and coordinates of the residual stream as far as
  a norm lets them be exchanged) and averages what is stored. "orthogonal" folds the norms, turns the residual stream by
  a rotation and each head by one, matches the orders, and averages factors. "gauge" does all that in the balanced form
  of each head, undoes scales, and averages the products of each head, cut back to their rank. Beside them, "factors":
  B as the gauge arm aligns it, then averaged with A as stored, without products: what does that last step do?
- Control: for the even seeds, B is a copy of A that `erlangen.gauge.random_move` moved (condition 10, heads and neurons
  permuted, residual stream turned). An arm that knows the whole gauge has no barrier here.
- Measure: the held-out loss in nats a character, and the barrier: the largest excess over t of the loss above the
  straight line between the losses of its ends, at least 0.
- Before the study single runs on seed 1000 were looked at, of each family, at learning rates 0.003 and 0.006 and up to
  1200 steps: the rates were not told apart, and the steps were set by the time there was. No two models were merged.
- Rule: the mean over pairs of the paired difference of barriers, with its 95 % Student interval; a difference is called
  only where the interval leaves out zero. Compared are permutation with naive, orthogonal with permutation, gauge with
  orthogonal, gauge with naive, and gauge with factors, in each family.

What tied tables would change: a model whose output map is its token table can only turn its residual stream by what
its final norm's gain lets through, which is no rotation. The tables here are untied so that this part is there at all.

Shape suffixes: B windows, T tokens, V vocabulary.
"""

from .results import compare as compare
from .results import run as run
from .results import tables as tables
from .study import MergeConfig as MergeConfig
from .study import measure as measure
from .study import quick as quick
from .study import train_models as train_models
