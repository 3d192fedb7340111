"""The settings of a run that must not change, or only if the user says so: `network.json`."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from impala.config import ConfigError, TrainingConfig
from impala.learning.learner import LearnerConfig
from impala.networks.agent import AgentConfig
from impala.networks.torsos import LATENT_SIZE
from impala.runs.files import NETWORK_FILE, LogdirError, checkpoint_paths, write_atomically
from impala.trajectory import EnvironmentSpec

# In the settings of a network: names of the levels, in their order; not there without PopArt.
POPART_LEVELS = 'popart or --level_name (levels whose values are normalised)'
_FRAME_DTYPE = 'level_name (dtype of the frames)'
# Runs from before these were stored go on without them.
LATER_SETTINGS = (_FRAME_DTYPE,)
# In the file of the network's settings, what `check_same_run` compares.
_COUNTED_BY = 'counted_by'


def learner_settings(config: LearnerConfig) -> dict[str, Any]:
    """Returns the flags that shape what the learner keeps beside the network, if not as ever.

    They are for `checkpoint.check_same_network`; runs that have no such flags stored have neither.
    """
    settings: dict[str, Any] = {}
    if config.optimizer != 'rmsprop':
        settings['optimizer'] = config.optimizer
    if config.target_update_steps:
        settings['target_update_steps (whether there is a target network)'] = True
    return settings


def network_settings(network: AgentConfig, spec: EnvironmentSpec) -> dict[str, Any]:
    """Returns the flags that shape the network, for `checkpoint.check_same_network`."""
    frame: Sequence[int] = spec.observation['frame'].shape
    settings: dict[str, Any] = {
        'torso': network.torso,
        'use_lstm': network.use_lstm,
        'level_name or --full_action_set (number of actions)': spec.num_actions,
        'level_name, --width, --height or --frame_stack (shape of the frames)': list(frame),
        _FRAME_DTYPE: spec.observation['frame'].dtype,
        'level_name (whether it has instructions)': 'instruction' in spec.observation,
    }
    # Left out without it, so that runs from before there was such a thing can be resumed.
    if network.popart_levels:
        settings[POPART_LEVELS] = list(network.popart_levels)
    if network.torso == 'autoencoder':
        settings['latent_size'] = network.latent_size
    return settings


def counted_by(config: TrainingConfig, spec: EnvironmentSpec) -> dict[str, Any]:
    """Returns what gives a run's counters and logs their meaning, for `checkpoint.check_same_run`.

    Agent steps are counted, and frames, with all schedules, are agent steps times the repeats.
    """
    return {'num_action_repeats': spec.num_action_repeats, 'levels': list(config.level_names)}


def popart_levels(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns `AgentConfig.popart_levels` of what `network_settings` returned.

    Raises:
      ConfigError: it comes from a file and is damaged.
    """
    levels = settings.get(POPART_LEVELS, [])
    if not isinstance(levels, (list, tuple)) or not all(isinstance(each, str) for each in levels):
        raise ConfigError(
            f'The settings of the network are damaged: {POPART_LEVELS} is {levels!r}.'
        )
    return tuple(levels)


def frame_dtype(settings: Mapping[str, Any], frame_shape: Sequence[int]) -> str:
    """Returns the dtype of the frames of what `network_settings` returned.

    Of runs from before it was stored: uint8 for images, float32 for all else.
    """
    return settings.get(_FRAME_DTYPE, 'uint8' if len(frame_shape) == 3 else 'float32')


def latent_size(settings: Mapping[str, Any]) -> int:
    """Returns `AgentConfig.latent_size` of what `network_settings` returned."""
    return settings.get('latent_size', LATENT_SIZE)


def stored_settings(logdir: str) -> dict[str, Any] | None:
    """Returns the settings of the network that `store_settings` stored, None if there are none.

    Raises:
      LogdirError: if the file cannot be read.
    """
    stored = _stored(logdir)
    return stored and {name: value for name, value in stored.items() if name != _COUNTED_BY}


def store_settings(logdir: str, network: dict[str, Any], counted_by: dict[str, Any]) -> None:
    """Stores what must not change from now on, or only if the user says so.

    Args:
      logdir: the log directory; created if missing.
      network: flag name -> JSON-serialisable value, for `check_same_network`.
      counted_by: as of `run_config.counted_by`, for `check_same_run`.

    Raises:
      LogdirError: if the file cannot be written.
    """
    settings = network | {_COUNTED_BY: counted_by}
    text = json.dumps(settings, indent=2, sort_keys=True) + '\n'
    write_atomically(os.path.join(logdir, NETWORK_FILE), text)


def check_same_network(logdir: str, settings: dict[str, Any], later: Collection[str] = ()) -> None:
    """Compares the settings that shape the network with those of the run before.

    As long as there is no checkpoint nothing depends on them, and any will do.

    Args:
      logdir: the log directory.
      settings: flag name -> JSON-serialisable value.
      later: names of settings that are not compared if none was stored: the run may be from before
        they were.

    Raises:
      LogdirError: if the run was started with other values; names each flag with both. Also if
        the file cannot be read.
    """
    settings = json.loads(json.dumps(settings))
    stored = stored_settings(logdir) if checkpoint_paths(logdir) else None
    if stored is None:
        return
    stored = {name: settings[name] for name in later if name in settings} | stored
    different = [
        f'--{name} was {_shown(stored, name)} and is now {_shown(settings, name)}'
        for name in sorted({*stored, *settings})
        if name not in stored or name not in settings or stored[name] != settings[name]
    ]
    if different:
        raise LogdirError(
            f'The run in {logdir} has another network or optimizer: {", ".join(different)}; '
            'set them back, or give another --logdir.'
        )


def check_same_run(logdir: str, counted_by: dict[str, Any], allow_level_change: bool) -> None:
    """Refuses what would give the run's counters or logs another meaning half-way.

    Args:
      logdir: the log directory.
      counted_by: as of `run_config.counted_by`; a run from before it was stored is not compared.
      allow_level_change: whether the levels may be others.

    Raises:
      LogdirError: if they were others; names the flag. Also if the file cannot be read.
    """
    stored = (_stored(logdir) or {}).get(_COUNTED_BY) if checkpoint_paths(logdir) else None
    if stored is None:
        return
    if not isinstance(stored, dict):
        raise _damaged(logdir, f'{_COUNTED_BY} is {json.dumps(stored)}')
    repeats = counted_by['num_action_repeats']
    if stored.get('num_action_repeats', repeats) != repeats:
        raise LogdirError(
            f'The run in {logdir} counts frames by another number of repeats: '
            f'--num_action_repeats was {_shown(stored, "num_action_repeats")} and is now '
            f'{repeats}; set it back, or give another --logdir.'
        )
    levels = stored.get('levels', counted_by['levels'])
    if not isinstance(levels, list) or not all(isinstance(level, str) for level in levels):
        raise _damaged(logdir, f'levels is {json.dumps(levels)}')
    if {*levels} != {*counted_by['levels']} and not allow_level_change:
        raise LogdirError(
            f'The run in {logdir} has other levels: --level_name was {_few(levels)} and is now '
            f'{_few(counted_by["levels"])}; set it back, give another --logdir, or '
            '--allow_level_change to go on with other levels, after which its logs are of both.'
        )


def _stored(logdir: str) -> dict[str, Any] | None:
    """Returns all that `store_settings` stored; see `stored_settings`."""
    path = os.path.join(logdir, NETWORK_FILE)
    try:
        with open(path, encoding='utf-8') as file:
            settings = json.load(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LogdirError(f'Cannot read {path}: {error.strerror}.') from error
    except (ValueError, RecursionError) as error:
        raise _damaged(logdir, str(error)) from error
    if not isinstance(settings, dict):
        raise _damaged(logdir, 'it has no settings')
    return settings


def _damaged(logdir: str, what: str) -> LogdirError:
    path = os.path.join(logdir, NETWORK_FILE)
    return LogdirError(
        f'{path} is damaged ({what}): remove it if the flags are those the run was started with.'
    )


def _few(names: Sequence[str]) -> str:
    if len(names) <= 3:
        return ','.join(names)
    return f'{names[0]},{names[1]},... ({len(names)} levels)'


def _shown(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else 'not set'
