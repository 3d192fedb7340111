"""Training: actors, behaviour policy, queue and learner, put together (Figure 1 of the paper)."""

from impala.errors import TrainingError
from impala.training.hooks import Hook, Update
from impala.training.loop import train

__all__ = ['Hook', 'TrainingError', 'Update', 'train']
