"""The symmetries of attention: enforce, live on, reduce or break them, exactly and fast.

The families are reached as attributes (``erlangen.lm``, ``erlangen.breaking`` ...) and imported on first use, so that
``import erlangen`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import breaking as breaking
    from . import finite as finite
    from . import gauge as gauge
    from . import interop as interop
    from . import lie as lie
    from . import lm as lm
    from . import optim as optim
    from . import report as report
    from . import studies as studies
    from . import testing as testing

__version__ = "0.1.0"

__all__ = ["breaking", "finite", "gauge", "interop", "lie", "lm", "optim", "report", "studies", "testing"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'erlangen' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
