"""Testers for users and for our own tests: equivariance in float64, and low precision judged by an error ratio.

Each helper raises an AssertionError that holds a table of the measured errors, and returns that table otherwise.
None passes on a test that proves nothing: see ``allow_trivial`` in :func:`assert_equivariant`.
"""

from .equivariance import ErrorRow as ErrorRow
from .equivariance import ErrorTable as ErrorTable
from .equivariance import assert_equivariant as assert_equivariant
from .equivariance import assert_invariant as assert_invariant
from .precision import PrecisionRow as PrecisionRow
from .precision import PrecisionTable as PrecisionTable
from .precision import assert_low_precision as assert_low_precision

__all__ = [
    "ErrorRow",
    "ErrorTable",
    "PrecisionRow",
    "PrecisionTable",
    "assert_equivariant",
    "assert_invariant",
    "assert_low_precision",
]
