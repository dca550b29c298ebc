"""Enforce a finite symmetry: any group that permutes the positions of a window and the letters that stand there.

A few generators give a :class:`PermutationGroup`, listed and verified, with all its real irreps:
``reverse_complement(36)``, ``dihedral(8)``, ``PermutationGroup([[1, 2, 0]])``. Layers over it are equivariant by
construction (`EquivariantLinear`, `EquivariantAttention`, `EquivariantBlock`), or partly, by dials (`PartialLinear`);
channels show how much of each symmetry there is, and `scan` and `discover` find it in data.
"""

from ._parsing import parse as parse
from .attention import EquivariantAttention as EquivariantAttention
from .attention import EquivariantBlock as EquivariantBlock
from .attention import EquivariantPool as EquivariantPool
from .attention import InvariantPool as InvariantPool
from .attention import acts_on_line as acts_on_line
from .channels import channel_energies as channel_energies
from .channels import channel_transfer as channel_transfer
from .channels import energy_table as energy_table
from .channels import transfer_table as transfer_table
from .discovery import Discovery as Discovery
from .discovery import Scan as Scan
from .discovery import discover as discover
from .discovery import scan as scan
from .groups import Element as Element
from .groups import PermutationGroup as PermutationGroup
from .irreps import Irrep as Irrep
from .irreps import Representation as Representation
from .irreps import fourier as fourier
from .linear import EquivariantEmbedding as EquivariantEmbedding
from .linear import EquivariantLinear as EquivariantLinear
from .linear import EquivariantMLP as EquivariantMLP
from .linear import EquivariantNorm as EquivariantNorm
from .linear import GroupBasis as GroupBasis
from .named import alternating as alternating
from .named import cyclic as cyclic
from .named import dihedral as dihedral
from .named import direct_product as direct_product
from .named import inverted_repeat as inverted_repeat
from .named import klein as klein
from .named import quaternion as quaternion
from .named import reversal as reversal
from .named import reverse_complement as reverse_complement
from .named import symmetric as symmetric
from .named import wreath_product as wreath_product
from .nulls import energy_null as energy_null
from .nulls import false_discovery_rates as false_discovery_rates
from .nulls import invariant_energy as invariant_energy
from .partial import PartialBias as PartialBias
from .partial import PartialLinear as PartialLinear
from .projectors import Channels as Channels
from .psead import PSEADAttention as PSEADAttention
from .sequences import UNKNOWN as UNKNOWN
from .sequences import Motif as Motif
from .sequences import Record as Record
from .sequences import encode as encode
from .sequences import read_fasta as read_fasta
from .sequences import read_pfm as read_pfm
from .sequences import strand_correlation as strand_correlation
from .windows import Windows as Windows
