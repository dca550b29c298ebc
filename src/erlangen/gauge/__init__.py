"""Reduce: the redundancy of a transformer's weights, described, counted, fixed, looked past and measured.

Rotating the queries and keys of a head together, or its values and output, changes no number that the model returns.
`HeadLayout` and `ModelLayout` say where a model keeps its weights, ours or a foreign one; `flat_directions` counts what
is redundant, `canonicalize` settles it, `random_move` moves along it, `compare` does not see it, `align` brings one
model to another along it, and `merge` averages the two; `charges` measures how far a training run has left the
zero-charge orbit on which that symmetry holds it.
"""

from ._charges import charges as charges
from ._head_state import release as release
from ._pairs import free_sectors as free_sectors
from ._reduced import ReducedLinear as ReducedLinear
from ._spectra import HeadSpectra as HeadSpectra
from ._spectra import head_spectra as head_spectra
from .align import Alignment as Alignment
from .align import align as align
from .canonical import canonicalize as canonicalize
from .carry import CarriedState as CarriedState
from .carry import carry_gradients as carry_gradients
from .carry import carry_optimizer as carry_optimizer
from .certificate import Certificate as Certificate
from .chart import charted as charted
from .compare import compare as compare
from .comparison import Comparison as Comparison
from .dressed import dressed as dressed
from .dressed_heads import DressedHeads as DressedHeads
from .dressed_heads import DressedPair as DressedPair
from .dressed_heads import dress as dress
from .dressed_heads import dress_heads as dress_heads
from .dressing import DRESSINGS as DRESSINGS
from .dressing import DressingField as DressingField
from .dressing import dressing as dressing
from .dressing import dressing_field as dressing_field
from .flat import FlatDirections as FlatDirections
from .flat import flat_directions as flat_directions
from .horizontal import horizontal as horizontal
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
from .merge import Barrier as Barrier
from .merge import barrier as barrier
from .merge import merge as merge
from .monitor import GaugeMonitor as GaugeMonitor
from .moves import random_move as random_move
from .quotient import QuotientSGD as QuotientSGD
from .relational import RelationalAttention as RelationalAttention
from .relational import RelationalBlock as RelationalBlock
from .relational import RelationalMLP as RelationalMLP
from .relational import RelationalRMSNorm as RelationalRMSNorm
from .shrink import Shrunk as Shrunk
from .shrink import reduce_maps as reduce_maps
from .shrink import shrink as shrink
