"""The groups by name."""

import re

from ._base import Group
from .affine import Affine, Translation
from .linear import GeneralLinear, Rotations
from .product import Product

SO2 = Rotations(2)
SO3 = Rotations(3)
SE2 = Affine("SE2", SO2)
SE3 = Affine("SE3", SO3)
Sim2 = Affine("Sim2", Rotations(2, scaled=True))
Sim3 = Affine("Sim3", Rotations(3, scaled=True))
Aff2 = Affine("Aff2", GeneralLinear(2))
Aff3 = Affine("Aff3", GeneralLinear(3))
GL = GeneralLinear

_NAMED: dict[str, Group] = {str(group): group for group in (SO2, SO3, SE2, SE3, Sim2, Sim3, Aff2, Aff3)}
_FAMILIES = {"GL": GeneralLinear, "Translation": Translation}


def parse(name: str) -> Group:
    """The group that prints as ``name``: "SE2", "GL(4)", "Translation(3)", "SO3 x Translation(1)".

    Raises:
        ValueError: no group has that name.
    """
    if " x " in name:
        return Product(*map(parse, name.split(" x ")))
    if name in _NAMED:
        return _NAMED[name]
    match = re.fullmatch(r"(GL|Translation)\((\d+)\)", name)
    if match is None:
        known = ", ".join([*_NAMED, "GL(n)", "Translation(n)"])
        raise ValueError(f"no group is called {name!r}; there are {known}, and products such as 'SE2 x SO3'")
    return _FAMILIES[match[1]](int(match[2]))
