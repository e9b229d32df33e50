"""Training that brings back what compression lost, on held-in text only."""

from lmpress.recovery.apply import check_recovery_text, recover_checkpoint
from lmpress.recovery.lora import Recovered, train_lora
from lmpress.recovery.merge import merged

__all__ = ["Recovered", "check_recovery_text", "merged", "recover_checkpoint", "train_lora"]
