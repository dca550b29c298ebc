"""Reduce: the redundancy of an attention layer's weights, described, measured and (in time) removed.

Rotating the queries and keys of a head together, or its values and output, changes no number that the model returns.
`HeadLayout` says where a layer keeps the weights of its heads; `head_layouts` finds the layouts of a model, ours or a
foreign one; `charges` measures how far a training run has left the zero-charge orbit on which that symmetry holds it.
"""

from ._charges import charges as charges
from ._spectra import HeadSpectra as HeadSpectra
from ._spectra import head_spectra as head_spectra
from .canonical import canonicalize as canonicalize
from .certificate import Certificate as Certificate
from .compare import Comparison as Comparison
from .compare import compare as compare
from .flat import FlatDirections as FlatDirections
from .flat import flat_directions as flat_directions
from .layout import MLP as MLP
from .layout import Experts as Experts
from .layout import HeadLayout as HeadLayout
from .layout import LatentAttention as LatentAttention
from .layout import Layer as Layer
from .layout import ModelLayout as ModelLayout
from .layout import Norm as Norm
from .layout import Projection as Projection
from .layout import Rotary as Rotary
from .layout import describes as describes
from .layout import head_layouts as head_layouts
from .layout import model_layout as model_layout
from .layout import rows as rows
from .layout import unwrap as unwrap
from .moves import random_move as random_move
