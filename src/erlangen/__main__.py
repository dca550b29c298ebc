"""``python -m erlangen``, and so ``torchrun ... -m erlangen``."""

import sys

from erlangen.cli import main

sys.exit(main())
