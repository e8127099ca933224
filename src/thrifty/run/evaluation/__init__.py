"""What a model can do: losses, greedy answers, chosen options. Nothing here changes the model."""

from .answers import Answered, answer_all, questions
from .choices import choose, option_lists
from .losses import file_loss, mean_loss
from .quiet import evaluating

__all__ = [
    "Answered",
    "answer_all",
    "choose",
    "evaluating",
    "file_loss",
    "mean_loss",
    "option_lists",
    "questions",
]
