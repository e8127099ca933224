"""What is minimised: the next-token loss, with logits only where there are labels."""

from thrifty.objective.isolation import check_packing
from thrifty.objective.next_token import (
    LossPlan,
    install,
    installed_plan,
    label_count,
    loss_of,
    sum_loss,
    uninstall,
)
from thrifty.objective.proof import label_only, prepare

__all__ = [
    "LossPlan",
    "check_packing",
    "install",
    "installed_plan",
    "label_count",
    "label_only",
    "loss_of",
    "prepare",
    "sum_loss",
    "uninstall",
]
