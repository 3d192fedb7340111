"""The metrics of a run at Weights & Biases (https://wandb.ai), through its package `wandb`."""

import os
from collections.abc import Mapping
from typing import Any

from impala.config import Config, ConfigError, all_settings
from impala.runs.files import LogdirError, run_id
from impala.training.hooks import Hook
from impala.user_code import one_line


class WeightsAndBiases(Hook):
    """Sends every line of the log, and the settings of the run. A context manager.

    The run there has the name of the folder of this run. A resumed run continues it. What is sent
    is also in the folder `wandb` of this run; with WANDB_MODE=offline in the environment, it is
    only there.
    """

    def __init__(self, config: Config):
        """Finds the package; nothing begins yet.

        Args:
          config: of the run.

        Raises:
          ConfigError: the package is missing.
        """
        self._config = config
        self._run: Any = None
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f'{self._flag} needs a package that is not installed: '
                "pip install --no-build-isolation -e '.[wandb]'."
            ) from error
        self._wandb: Any = wandb

    def __enter__(self) -> 'WeightsAndBiases':
        """Begins or continues the run there.

        Raises:
          ConfigError: it cannot begin.
          LogdirError: the folder of the run cannot be written.
        """
        config, wandb = self._config, self._wandb
        logdir = os.path.abspath(config.run.logdir)
        try:
            self._run = wandb.init(
                project=config.run.wandb_project,
                name=os.path.basename(logdir),
                id=run_id(logdir),
                # Without a network there is nothing to resume, of which it would warn.
                resume=None if os.environ.get('WANDB_MODE') == 'offline' else 'allow',
                dir=logdir,
                config={name: config.value(name) for name in all_settings()},
                settings=wandb.Settings(console='off', silent=True),
            )
        except LogdirError:
            raise
        except Exception as error:  # Its own classes are not the same in all versions.
            raise ConfigError(
                f'{self._flag}: no run can begin there: {one_line(error).removesuffix(".")}; with '
                'WANDB_MODE=offline in the environment, neither account nor network is needed.'
            ) from error
        self._run.define_metric('*', step_metric='agent_steps')
        return self

    @property
    def _flag(self) -> str:
        return f'--wandb_project={self._config.run.wandb_project}'

    def after_line(self, line: Mapping[str, float]) -> None:
        """See `Hook`."""
        self._run.log(dict(line))

    def __exit__(self, kind: Any, *unused: Any) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)
