"""Break: give the heads of a transformer a preferred direction, with unlearned query and value biases.

The seed is "Symmetry Breaking in Transformers for Efficient and Interpretable Training" (arXiv 2601.22257). A vector
with a fixed mean and fresh noise is added to the queries (and another to the values) of each layer on every training
forward. With learned biases beside it the *mean* is only an initial value of those biases; it is the *noise* that
breaks the rotations of a head (see `erlangen.gauge.charges`).
"""

from ._bias import SymmetryBreaking as SymmetryBreaking
from ._bias import break_symmetry as break_symmetry
from ._bias import redraw as redraw
from ._bias import restore as restore
from .fold import fold as fold
from .key_prior import KeyPrior as KeyPrior
from .key_prior import key_prior as key_prior
from .key_prior import scaled_direction as scaled_direction
from .key_prior import steer as steer
from .key_prior import token_classes as token_classes
