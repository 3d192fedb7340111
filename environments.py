"""Level name -> environment, behind one small interface.

`create_environment` understands four kinds of names:

* `ALE/Pong-v5` (and the older Gymnasium ids of Atari games, `PongNoFrameskip-v4`): an Atari game
  with the preprocessing of the paper (Table G.1): 84x84 grey, every action repeated 4 times, the
  maximum of the last two frames, a stack of 4, up to 30 no-ops, a limit of 108,000 frames. The
  id selects the game only; everything else comes from `EnvironmentConfig`. An id of one's own for
  such a game also has what else it was registered with.
* any other Gymnasium id (`CartPole-v1`, `VizdoomBasic-v1`, `BabyAI-GoToRedBall-v0`); an id that is
  registered by a module of one's own is written as for Gymnasium, `my_package:MyGame-v0`.
* `my_package.my_module:make`: a callable of one's own, called with `(seed, config)`, that returns
  an `Environment`. It is the way to bring an environment without Gymnasium.
* a DeepMind Lab level: one of DMLab-30 by its bare name (`explore_goal_locations_small`), any other
  by its full one (`contributed/dmlab30/...`, `tests/...`, `seekavoid_arena_01`).
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
