"""For each setting another valid value, for tests of what may differ between runs or jobs."""

from typing import Any

from impala.config import all_settings

# Where the value that follows from type and bounds is not valid, or has no effect on Atari.
_OTHER = {
    'level_name': 'ALE/Breakout-v5',
    'core': 'gru',
    'job_name': 'actor',
    'env_kwargs': '{"sutton_barto_reward": true}',
    'observation_keys': ('screen',),
    'hooks': ('my_module:MyHook',),
    'inference_device': '/cpu:0',
    'profile_updates': '1:2',
    'learner_address': 'localhost:1',
    'learner_addresses': ('localhost:1',),
    'replay_addresses': ('localhost:1',),
}
# Settings without which the other value is not accepted, beyond those of `only_with`.
_BESIDE = {
    'clip_target_rho_threshold': {'target_update_steps': 1},
    'clip_actions': {'level_name': 'Pendulum-v1'},
    'core_size': {'core': 'lstm'},
    'env_kwargs': {'level_name': 'CartPole-v1'},
    'info_action_mask': {'level_name': 'CartPole-v1'},
    'job_name': {'task': 0},
    'normalize_observations': {'level_name': 'CartPole-v1'},
    'observation_keys': {'level_name': 'VizdoomBasic-v1'},
    'replay_addresses': {'replay_fraction': 0.5},
    'replay_capacity': {'replay_fraction': 0.5},
    'reuse_buffer': {'sample_reuse': 2},
}


def differing(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of two runs, name -> value, that differ only in one setting.

    The runs are of Atari, unless the setting has no effect there. The first has its default, the
    second another valid value.
    """
    known = all_settings()[name]
    shared = {'level_name': 'ALE/Pong-v5', **_BESIDE.get(name, {})}
    if known.setting.only_with is not None:
        other, value = known.setting.only_with
        shared[other] = value
    return shared, shared | {name: _OTHER.get(name, _other_value(name))}


def _other_value(name: str) -> Any:
    known = all_settings()[name]
    default, low, high = known.default, known.setting.low, known.setting.high
    if known.kind is bool:
        return not default
    if known.setting.choices:
        return [choice for choice in known.setting.choices if choice != default][-1]
    if known.kind not in (int, float):
        return known.kind(['other']) if known.kind is tuple else 'other'
    assert low is not None and high is not None
    if default is None:
        return known.kind(low)
    if known.kind is int:
        return default + 1 if default < high else default - 1
    return (default + (low if default > low else high)) / 2
