"""Optional libraries, imported where they are used and asked for by the name of the extra that brings them."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or raise an ImportError that names the extra to install.

    Args:
        module: full name of the module, such as ``"matplotlib.pyplot"``.
        extra: the extra of this package that depends on it, such as ``"report"``.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        raise ImportError(f"this needs {top}, which is not installed: pip install 'erlangen[{extra}]'") from error
