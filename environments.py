"""Level name -> environment, behind one small interface.

`create_environment` understands four kinds of names:

* `ALE/Pong-v5` (and the older Gymnasium ids of Atari games, `PongNoFrameskip-v4`): an Atari game
  with the preprocessing of the paper (Table G.1): 84x84 grey, every action repeated 4 times, the
  maximum of the last two frames, a stack of 4, up to 30 no-ops, a limit of 108,000 frames. The
  id selects only the game; everything else comes from `EnvironmentConfig`. For an id that you
  register yourself, the settings of the registration apply too.
* any other Gymnasium id (`CartPole-v1`, `VizdoomBasic-v1`, `BabyAI-GoToRedBall-v0`). If your own
  module registers the id, write `my_package:MyGame-v0`, as in Gymnasium.
* `my_package.my_module:make`: your own callable, which takes `(seed, config)` and returns an
  `Environment`. This adds an environment without Gymnasium.
* a DeepMind Lab level: DMLab-30 by its bare names (`explore_goal_locations_small`), others by their
  full names (`contributed/dmlab30/...`, `tests/...`, `seekavoid_arena_01`).
"""

from impala.environments import (
    Environment,
    EnvironmentConfig,
    LevelError,
    create_environment,
    hash_instruction,
)

__all__ = [
    'Environment',
    'EnvironmentConfig',
    'LevelError',
    'create_environment',
    'hash_instruction',
]
