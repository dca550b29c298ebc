"""Reduce: the redundancy of an attention layer's weights, described, measured and (in time) removed.

Rotating the queries and keys of a head together, or its values and output, changes no number that the model returns.
`HeadLayout` says where a layer keeps the weights of its heads; `head_layouts` finds the layouts of a model, ours or a
foreign one; `charges` measures how far a training run has left the zero-charge orbit on which that symmetry holds it.
"""

from ._charges import charges as charges
from ._layout import HeadLayout as HeadLayout
from ._layout import head_layouts as head_layouts
from ._layout import unwrap as unwrap
