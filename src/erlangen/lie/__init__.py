"""Live on a continuous symmetry: matrix Lie groups, with logarithms that are right at the identity and at half a turn.

Groups are stateless objects: ``SE2.exp(xi)``, ``SO3.log(g)``, ``Product(SE3, Translation(1))``. Elements are matrices
``[..., m, m]``, tangent vectors ``[..., dim]`` in the order scale, rotation, shear, translation. The whole contract is
the class :class:`Group`. `lie_attention` is attention between poses, `LieAttention` and `LieTransformer` the layers.
"""

from . import convert as convert
from ._base import Group as Group
from .affine import Translation as Translation
from .attention import lie_attention as lie_attention
from .attention import lie_scores as lie_scores
from .attention import lie_weights as lie_weights
from .attention import morton_order as morton_order
from .groups import GL as GL
from .groups import SE2 as SE2
from .groups import SE3 as SE3
from .groups import SO2 as SO2
from .groups import SO3 as SO3
from .groups import Aff2 as Aff2
from .groups import Aff3 as Aff3
from .groups import Sim2 as Sim2
from .groups import Sim3 as Sim3
from .groups import parse as parse
from .layers import LieAttention as LieAttention
from .layers import LieTransformer as LieTransformer
from .layers import LieTransformerConfig as LieTransformerConfig
from .product import Product as Product
from .values import lie_attention_tangent as lie_attention_tangent
from .values import lie_mean_tangent as lie_mean_tangent
from .values import lie_mean_update as lie_mean_update
from .values import lie_transport as lie_transport
