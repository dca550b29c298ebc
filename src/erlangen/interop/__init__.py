"""Foreign models: where those of `transformers` keep their weights, and their checkpoints."""

from .adapters import carry_adapter as carry_adapter
from .checkpoints import Checkpoint as Checkpoint
from .checkpoints import canonicalize_folder as canonicalize_folder
from .layouts import layout_of_config as layout_of_config
from .merging import merge_folders as merge_folders
from .shrinking import shrink_folder as shrink_folder
