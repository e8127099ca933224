"""What a model can do: losses, greedy answers, chosen options. Nothing here changes the model."""

from .answers import Answered, answer_all, questions
from .choices import Chosen, choose, option_lists
from .losses import example_losses, file_losses, mean_of, sum_losses
from .quiet import evaluating

__all__ = [
    "Answered",
    "Chosen",
    "answer_all",
    "choose",
    "evaluating",
    "example_losses",
    "file_losses",
    "mean_of",
    "option_lists",
    "questions",
    "sum_losses",
]
