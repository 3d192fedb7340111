"""IMPALA: the agent, the learner, the actors, and what carries trajectories between them.

Espeholt et al. 2018, https://arxiv.org/abs/1802.01561

The public names, also for use without the command line (docs/library.md):

    import impala

    impala.train(impala.Config.of(level_name='CartPole-v1', logdir='/tmp/cartpole'))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from impala.config import Config
    from impala.evaluation import evaluate
    from impala.learning.learner import Learner
    from impala.networks.agent import Agent
    from impala.training import Hook, Update, train

__all__ = ['Agent', 'Config', 'Hook', 'Learner', 'Update', 'evaluate', 'train']

_MODULES = {
    'Agent': 'impala.networks.agent',
    'Config': 'impala.config',
    'Hook': 'impala.training',
    'Learner': 'impala.learning.learner',
    'Update': 'impala.training',
    'evaluate': 'impala.evaluation',
    'train': 'impala.training',
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, as actor processes may not load TensorFlow."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if name == 'Config':
        return importlib.import_module(_MODULES[name]).Config
    from impala.runs.tensorflow_start import starting_tensorflow

    with starting_tensorflow():
        return getattr(importlib.import_module(_MODULES[name]), name)
