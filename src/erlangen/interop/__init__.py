"""Foreign models: where those of `transformers` keep their weights, and their checkpoints."""

from .checkpoints import Checkpoint as Checkpoint
from .checkpoints import canonicalize_folder as canonicalize_folder
from .layouts import layout_of_config as layout_of_config
