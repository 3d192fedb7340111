"""ViZDoom through Gymnasium, in a process that ends with its actor."""

import contextlib
import os
import shlex
import shutil
import tempfile
from typing import Any

from impala.config import EnvironmentConfig
from impala.environments.environment import Observation
from impala.environments.gymnasium import GymnasiumEnvironment
from impala.trajectory import EpisodeEnd


class VizdoomEnvironment(GymnasiumEnvironment):
    """A ViZDoom environment of Gymnasium, which runs the game in another process.

    By default that process and its shared memory outlive an actor that is killed, and it writes its
    settings to the current folder. Here it runs in a temporary folder and ends with the process
    that started it (if `setpriv` of util-linux is installed), and the names of its shared memory
    are removed as soon as both sides have opened it.

    At its own time limit ViZDoom returns zeros. With `bootstrap_truncated` the limit is kept here
    instead, at the same tic, so that there is a last observation.
    """

    def __init__(
        self, level_name: str, env: Any, repeats: int, seed: int, config: EnvironmentConfig
    ) -> None:
        """Takes over a ViZDoom environment made with `frame_skip=repeats`.

        Args, Raises: see `GymnasiumEnvironment`.
        """
        if config.bootstrap_truncated:
            env = _with_last_observation(env)
        super().__init__(level_name, env, repeats, seed, config)
        self._repeats = 1
        self._folder = tempfile.mkdtemp(prefix='vizdoom_', dir=config.temp_folder)
        self._fresh = True

        import vizdoom

        program = os.path.join(os.path.dirname(vizdoom.__file__), 'vizdoom')
        launcher = os.path.join(self._folder, 'vizdoom')
        die_with_parent = 'setpriv --pdeathsig KILL' if shutil.which('setpriv') else ''
        with open(launcher, 'w', encoding='utf-8') as file:
            # Ctrl-C reaches the whole process group, but only the actor may end the game.
            file.write(
                f"#!/bin/sh\ntrap '' INT\ncd {shlex.quote(self._folder)} || exit\n"
                f'exec {die_with_parent} {shlex.quote(program)} "$@"\n'
            )
        os.chmod(launcher, 0o700)
        # The folder may be on a file system mounted with noexec.
        if os.access(program, os.X_OK) and os.access(launcher, os.X_OK):
            env.unwrapped.game.set_vizdoom_path(launcher)

    def reset(self) -> Observation:
        observation = super().reset()
        if self._fresh:
            self._fresh = False
            with open('/proc/self/maps', encoding='utf-8') as file:
                paths = {line.split()[-1] for line in file if '/dev/shm/ViZDoom' in line}
            for path in paths:
                # Those of other environments in this process are gone already.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        return observation

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def step(self, action: Any) -> tuple[float, EpisodeEnd, Observation]:
        self._first_tic = self._env.unwrapped.game.get_episode_time()
        return super().step(action)

    def _end(self, terminated: bool, truncated: bool) -> EpisodeEnd:
        # ViZDoom repeats actions by itself, so the base class counts one frame per step.
        tic = self._env.unwrapped.game.get_episode_time()
        self.last_action_frames = tic - self._first_tic
        # ViZDoom reports an episode that ran out of time as both.
        return EpisodeEnd.TRUNCATED if truncated else EpisodeEnd.TERMINATED


def _with_last_observation(env: Any) -> Any:
    """Returns an environment that truncates an episode itself, at the same time limit."""
    import gymnasium

    doom = env.unwrapped

    class TimeLimit(gymnasium.Wrapper):
        """Ends episodes in place of the game, which goes on until it is reset."""

        def __init__(self) -> None:
            super().__init__(env)
            self._tics = doom.game.get_episode_timeout()
            self._repeats = doom.frame_skip
            doom.game.set_episode_timeout(0)

        def step(self, action: Any) -> Any:
            end = doom.game.get_episode_start_time() + self._tics
            doom.frame_skip = min(self._repeats, end - doom.game.get_episode_time())
            observation, reward, terminated, _, info = self.env.step(action)
            is_over = doom.game.get_episode_time() >= end
            return observation, reward, terminated, is_over and not terminated, info

    has_limit = doom.game.get_episode_timeout() > 0
    return TimeLimit() if has_limit and doom.treat_episode_timeout_as_truncation else env
