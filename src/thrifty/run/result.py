"""The model that a run leaves: plain modules with the trained weights, ready to answer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from thrifty.delta import Delta
from thrifty.objective.next_token import uninstall
from thrifty.update.peer import PeerTuning
from thrifty.update.tuning import Tuning

from .config import RunConfig
from .model import load_model
from .trainer import ThriftyTrainer

__all__ = ["finished"]


def finished(tuning: Tuning | PeerTuning, trainer: ThriftyTrainer, *, config: RunConfig, delta: Delta) -> nn.Module:
    """The plain model: no loss, no checkpointing, no autocast left on it.

    Of a sharded run it is the base, loaded again, with the run's `delta` on it: FSDP2 has no way back to a plain model.
    """
    if isinstance(trainer.model, FSDPModule):
        base = load_model(
            config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code, device=trainer.args.device
        )
        return delta.apply(base).eval()
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_disable()
    trainer.unwrap()
    model: Any = tuning.finish()
    uninstall(model)
    model.config.use_cache = trainer.used_cache
    return model.eval()
