"""The settings that must not change in a run, stored in `network.json`.

Weights and counters depend on them. Learners and actor jobs compare them, too. `flags_of` returns
the flags that set them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from impala.config import Config, ConfigError
from impala.networks.agent import AgentConfig, other_observations
from impala.runs.files import NETWORK_FILE, LogdirError, checkpoint_paths, write_atomically
from impala.trajectory import ACTION_MASK, EnvironmentSpec

# Key of the settings that `check_same_run` compares.
_COUNTED_BY = 'counted_by'
# Fixed settings that are not compared by their own values. `network_settings` and `counted_by` have
# what follows from them together with the level.
_RESOLVED = frozenset(
    {
        'width',
        'height',
        'num_action_repeats',
        'full_action_set',
        'frame_stack',
        'torso',
        'latent_size',
        'core',
        'core_size',
        'popart',
        'contrast_gain',
    }
)
# Settings that earlier runs do not have in their files, with the value that they ran with.
LATER_SETTINGS = {'contrast_gain': 0.0}
# Settings that a run may change when it resumes, although its jobs must agree on them.
_FREE = frozenset({'has_action_mask'})
# Settings that are not set by the flag of the same name.
_FLAGS = {
    'actions': '--level_name, --full_action_set or --clip_actions (actions)',
    'frame_shape': '--level_name, --width, --height or --frame_stack (shape of the frames)',
    'frame_dtype': '--level_name (dtype of the frames)',
    'has_instructions': '--level_name or --observation_keys (whether there are instructions)',
    'has_action_mask': '--level_name or --info_action_mask (whether actions are masked)',
    'other_observations': '--level_name or --observation_keys (other observations)',
    'parts': '--level_name or --observation_keys (entries of the observation)',
    'popart_levels': '--popart or --level_name (levels whose values are normalized)',
    'has_target_network': '--target_update_steps (whether there is a target network)',
}


def flags_of(setting: str) -> str:
    """Returns the flags that set a setting, for a sentence about it."""
    return _FLAGS.get(setting, f'--{setting}')


def network_settings(network: AgentConfig, spec: EnvironmentSpec) -> dict[str, Any]:
    """Returns the settings that determine the shapes of the network; JSON-serializable."""
    frame = spec.observation['frame']
    return {
        'torso': network.torso,
        'core': network.core,
        'core_size': network.core_size,
        'popart_levels': list(network.popart_levels),
        'latent_size': network.latent_size,
        'normalize_observations': network.normalize_observations,
        'contrast_gain': network.contrast_gain,
        'actions': spec.action.to_json(),
        'frame_shape': list(frame.shape),
        'frame_dtype': frame.dtype,
        'has_instructions': 'instruction' in spec.observation,
        'has_action_mask': ACTION_MASK in spec.observation,
        'other_observations': {
            name: [list(array.shape), array.dtype]
            for name, array in other_observations(spec).items()
        },
        'parts': {
            name: [[part.kind, list(part.sizes)] for part in array.parts]
            for name, array in sorted(spec.observation.items())
            if array.parts
        },
    }


def checkpoint_settings(
    config: Config, network: AgentConfig, spec: EnvironmentSpec
) -> dict[str, Any]:
    """Returns the settings that determine the variables of a checkpoint; JSON-serializable.

    Every setting with `on_resume='fixed'` is among them, unless it is one of `_RESOLVED`.

    Args:
      config: of the run.
      network: shape of its network.
      spec: of its environments.
    """
    unresolved = {name: value for name, value in config.fixed().items() if name not in _RESOLVED}
    has_target_network = bool(config.learner.loss.target_update_steps)
    return network_settings(network, spec) | unresolved | {'has_target_network': has_target_network}


def counted_by(level_names: Sequence[str], spec: EnvironmentSpec) -> dict[str, Any]:
    """Returns the settings that give a run's counters and logs their meaning; JSON-serializable.

    A run counts agent steps; frames and all schedules follow from these and the action repeats.
    """
    return {'num_action_repeats': spec.num_action_repeats, 'levels': list(level_names)}


def popart_levels(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns `AgentConfig.popart_levels` from `network_settings` of a file or another process.

    Raises:
      ConfigError: the settings are damaged.
    """
    levels = settings.get('popart_levels')
    if not _are_names(levels):
        raise ConfigError(
            f"The settings of the network are damaged: 'popart_levels' is {levels!r}."
        )
    return tuple(levels)


def stored_settings(logdir: str) -> dict[str, Any] | None:
    """Returns the `checkpoint_settings` in the log directory, None if there are none.

    Raises:
      LogdirError: the file cannot be read.
    """
    stored = _stored(logdir)
    return stored and {name: value for name, value in stored.items() if name != _COUNTED_BY}


def store_settings(logdir: str, settings: dict[str, Any], counted_by: dict[str, Any]) -> None:
    """Stores the settings that must not change when the run resumes.

    Args:
      logdir: the log directory; created if missing.
      settings: from `checkpoint_settings`.
      counted_by: from the function `counted_by`.

    Raises:
      LogdirError: the file cannot be written.
    """
    text = json.dumps(settings | {_COUNTED_BY: counted_by}, indent=2, sort_keys=True) + '\n'
    write_atomically(os.path.join(logdir, NETWORK_FILE), text)


def check_same_network(logdir: str, settings: dict[str, Any]) -> None:
    """Rejects settings whose variables differ from those of the run's checkpoints.

    Without a checkpoint, any settings are accepted.

    Args:
      logdir: the log directory.
      settings: from `checkpoint_settings`.

    Raises:
      LogdirError: the run was started with other settings, and the text names the flags and both
        values; or the file cannot be read.
    """
    settings = json.loads(json.dumps(settings))
    stored = stored_settings(logdir) if checkpoint_paths(logdir) else None
    if stored is None:
        return
    stored = {name: value for name, value in LATER_SETTINGS.items() if name in settings} | stored
    different = [
        f'{flags_of(name)} was {_shown(stored, name)} and is now {_shown(settings, name)}'
        for name in sorted({*stored, *settings} - _FREE)
        if name not in stored or name not in settings or stored[name] != settings[name]
    ]
    if different:
        raise LogdirError(
            f'The run in {logdir} has another network or optimizer: {", ".join(different)}; '
            'set them back, or give another --logdir.'
        )


def check_same_run(logdir: str, counted_by: dict[str, Any], allow_level_change: bool) -> None:
    """Rejects settings that would change the meaning of the run's counters or logs.

    Args:
      logdir: the log directory.
      counted_by: from the function `counted_by`.
      allow_level_change: whether the levels may differ.

    Raises:
      LogdirError: the run was started with other settings, and the text names the flag; or the file
        cannot be read.
    """
    settings = _stored(logdir) if checkpoint_paths(logdir) else None
    if settings is None:
        return
    stored = settings.get(_COUNTED_BY)
    if not isinstance(stored, dict):
        raise _damaged(logdir, f'{_COUNTED_BY} is {json.dumps(stored)}')
    repeats, levels = stored.get('num_action_repeats'), stored.get('levels')
    if not isinstance(repeats, int):
        raise _damaged(logdir, f'num_action_repeats is {json.dumps(repeats)}')
    if not _are_names(levels):
        raise _damaged(logdir, f'levels is {json.dumps(levels)}')
    if repeats != counted_by['num_action_repeats']:
        raise LogdirError(
            f'The run in {logdir} counts frames by another number of repeats: '
            f'--num_action_repeats was {repeats} and is now {counted_by["num_action_repeats"]}; '
            'set it back, or give another --logdir.'
        )
    if {*levels} != {*counted_by['levels']} and not allow_level_change:
        raise LogdirError(
            f'The run in {logdir} has other levels: --level_name was {_few(levels)} and is now '
            f'{_few(counted_by["levels"])}; set it back, give another --logdir, or '
            '--allow_level_change to continue with other levels; its logs then cover both.'
        )


def _stored(logdir: str) -> dict[str, Any] | None:
    """Returns everything that `store_settings` stored, None if there is no file."""
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


def _are_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _few(names: Sequence[str]) -> str:
    if len(names) <= 3:
        return ','.join(names)
    return f'{names[0]},{names[1]},... ({len(names)} levels)'


def _shown(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else 'not set'
