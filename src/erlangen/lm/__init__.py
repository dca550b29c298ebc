"""A transformer whose attention symmetry is visible, the corpora it reads and the loop that trains it."""

from . import reasoning as reasoning
from .checkpoint import CheckpointError as CheckpointError
from .config import PRESETS as PRESETS
from .config import GPTConfig as GPTConfig
from .config import preset as preset
from .corpus import Corpus as Corpus
from .corpus import Tokens as Tokens
from .corpus import load_corpus as load_corpus
from .model import GPT as GPT
from .presets import RUN_PRESETS as RUN_PRESETS
from .presets import run_preset as run_preset
from .settings import BreakingConfig as BreakingConfig
from .settings import DataConfig as DataConfig
from .settings import OptimizerConfig as OptimizerConfig
from .settings import ReductionConfig as ReductionConfig
from .settings import TrainConfig as TrainConfig
from .tokenizers import load_tokenizer as load_tokenizer
from .train import TrainingError as TrainingError
from .train import TrainResult as TrainResult
from .train import evaluate as evaluate
from .train import load as load
from .train import resume as resume
from .train import train as train
