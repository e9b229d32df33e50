"""Training that brings back what compression lost, on held-in text only."""

from lmpress.recovery.apply import recover_checkpoint
from lmpress.recovery.lora import Recovered, train_lora
from lmpress.recovery.merge import merged

__all__ = ["Recovered", "merged", "recover_checkpoint", "train_lora"]
