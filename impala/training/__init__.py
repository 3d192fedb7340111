"""Training: actors, behaviour policy, queue and learner, put together (Figure 1 of the paper)."""

from impala.errors import TrainingError
from impala.training.hooks import Hook, Update
from impala.training.loop import train
from impala.training.run import Placement

__all__ = ['Hook', 'Placement', 'TrainingError', 'Update', 'train']
