"""Training: one loop that knows no model, its optimiser, average, schedule, log and saved states."""

from hma_gym.nn.parameters import ParameterGroup, default_parameter_groups
from hma_gym.training.config import Every, TrainConfig
from hma_gym.training.ema import EMA
from hma_gym.training.logging import read_log
from hma_gym.training.loop import Batches, Evaluator, Trainable, TrainResult, train
from hma_gym.training.mixture import Mixture, mixture_probabilities
from hma_gym.training.optim import Optimizer, OptimizerConfig
from hma_gym.training.saved import saved_weights
from hma_gym.training.schedule import learning_rate_factor

__all__ = [
    "EMA",
    "Batches",
    "Evaluator",
    "Every",
    "Mixture",
    "Optimizer",
    "OptimizerConfig",
    "ParameterGroup",
    "TrainConfig",
    "TrainResult",
    "Trainable",
    "default_parameter_groups",
    "learning_rate_factor",
    "mixture_probabilities",
    "read_log",
    "saved_weights",
    "train",
]
