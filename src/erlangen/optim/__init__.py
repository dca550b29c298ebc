"""Optimisers: Energy Conserving Descent and SOAP, and five optimisers by name."""

from ._registry import OPTIMIZERS as OPTIMIZERS
from ._registry import OptimizerInfo as OptimizerInfo
from ._registry import create as create
from .ecd import ECD as ECD
from .ecd import EnergyError as EnergyError
from .muon import MuonAdamW as MuonAdamW
from .soap import SOAP as SOAP

__all__ = ["ECD", "OPTIMIZERS", "SOAP", "EnergyError", "MuonAdamW", "OptimizerInfo", "create"]
