"""Foreign models: where those of `transformers` keep their weights, and their checkpoints."""

from erlangen.breaking import break_symmetry as break_symmetry
from erlangen.breaking import fold as fold
from erlangen.breaking import restore as restore

from .adapters import carry_adapter as carry_adapter
from .checkpoints import Checkpoint as Checkpoint
from .checkpoints import canonicalize_folder as canonicalize_folder
from .layouts import layout_of_config as layout_of_config
from .merging import merge_folders as merge_folders
from .shrinking import shrink_folder as shrink_folder
