"""The tiny models of transformers are those of the gauge tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "gauge"))
