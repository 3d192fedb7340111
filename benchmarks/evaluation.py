"""How much of the cores' time test mode turns into play.

    python -m benchmarks.evaluation --num_episodes=10

Eight Atari games are played by test mode with the tiny agent of `benchmarks.infrastructure`, and,
for comparison, by as many processes as there are cores, with random actions and nothing else. Both
play whole episodes, the same number of each game, and both take turns for a while, since the speed
of shared machines drifts. The tiny agent acts at random, too, so episodes have similar lengths.

A speed is the agent steps of all these episodes over the time from the start of the processes to
the end of the last episode. It includes the start of either side, and the time at the end in which
only the longest episodes are played. In the comparison each process has its share of every game and
plays one game after the other, so that all cores are busy until almost the end. Processor time is
that of all processes, without the import of TensorFlow; where other work shares the cores, only
processor time is meaningful.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tabulate

from impala.acting.episode_series import (
    Episode,
    EpisodeQueues,
    EpisodeSeries,
    Schedule,
    with_action_noise,
)
from impala.environments import EnvironmentConfig

GAMES = ('Pong', 'Breakout', 'Boxing', 'Freeway', 'Qbert', 'Seaquest', 'SpaceInvaders', 'Enduro')
LEVELS = tuple(f'ALE/{game}-v5' for game in GAMES)
CONFIG = EnvironmentConfig(full_action_set=True)


def play_at_random(level_names: list[str], num_episodes: int) -> int:
    """Plays whole episodes with random actions; returns the agent steps."""
    random = np.random.default_rng(1)
    steps = 0
    for name in level_names:
        queues = EpisodeQueues([[Episode(name, number, number) for number in range(num_episodes)]])
        series = EpisodeSeries(name, CONFIG, queues, 0, lambda *result: None)
        series.reset()
        while not series.is_done:
            series.step(int(random.integers(series.spec.num_actions)))
            steps += 1
        series.close()
    return steps


class Stopwatch:
    """Seconds, and processor seconds of this process and the children it has waited for."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._processor_started = self._processor_seconds()

    def rates(self, steps: int) -> tuple[float, float]:
        """Returns steps per second and per processor second since it was made."""
        processor_seconds = self._processor_seconds() - self._processor_started
        return steps / (time.perf_counter() - self._started), steps / processor_seconds

    def _processor_seconds(self) -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system


def without_agent(num_episodes: int) -> tuple[float, float]:
    """Returns the speeds of one process per core, from their start to the last's end.

    Each has its share of the episodes of every game, so that all end at about the same time.
    """
    cores = len(os.sched_getaffinity(0))
    shares = [num_episodes // cores + (core < num_episodes % cores) for core in range(cores)]
    stopwatch = Stopwatch()
    processes = [
        subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.evaluation', f'--random={share}'],
            stdout=subprocess.PIPE,
        )
        for share in shares
        if share
    ]
    steps = sum(int(process.communicate()[0]) for process in processes)
    return stopwatch.rates(steps)


def with_agent(num_episodes: int, num_processes: int, slots_per_level: int) -> tuple[float, float]:
    """Returns the speeds of test mode, from the actors' start to their end."""
    import tensorflow as tf

    from benchmarks.infrastructure import TinyAgent
    from impala.acting.actor_processes import ActorHost
    from impala.acting.local_actors import LocalActors
    from impala.config import Config
    from impala.evaluation import test_mode as evaluation

    # As experiment.py does.
    tf.config.threading.set_inter_op_parallelism_threads(1)
    num_slots = slots_per_level * len(LEVELS)
    run = Config.of(
        mode='test',
        num_actors=num_slots,
        envs_per_process=-(-num_slots // num_processes),
        torso='shallow',
        test_num_episodes=num_episodes,
    )
    run = dataclasses.replace(run, environment=CONFIG)
    config = evaluation.settings_of_test(run, len(LEVELS))
    with ActorHost(config.environment) as actor_host:
        spec = actor_host.common_spec(LEVELS, 1)
        tf.random.set_seed(1)
        steps = 0

        def ended(episode_steps: int) -> None:
            nonlocal steps
            steps += episode_steps
            if schedule.is_complete:
                actors.close()

        schedule = Schedule(LEVELS, num_slots, num_episodes, config.run.seed, ended)
        actors = LocalActors(
            config,
            LEVELS,
            with_action_noise(spec),
            TinyAgent(spec.num_actions),
            actor_host,
            print,
            schedule,
        )
        stopwatch = Stopwatch()
        with actors:
            actors.discard_unrolls()
        actors.check()
        if not schedule.is_complete:
            raise RuntimeError('Some episodes have no result.')
        return stopwatch.rates(steps)


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--num_episodes', type=int, default=10)
    parser.add_argument('--slots_per_level', type=int, default=2)
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--repetitions', type=int, default=3)
    parser.add_argument('--random', type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.random:
        print(play_at_random(list(LEVELS), args.random))
        return

    from benchmarks import machine, stages

    rows = []
    shares = []
    for number in range(args.repetitions):
        stages.begin(f'repetition {number + 1} of {args.repetitions}: random actions alone')
        reference = without_agent(args.num_episodes)
        stages.begin(f'repetition {number + 1} of {args.repetitions}: test mode')
        tested = with_agent(args.num_episodes, args.processes, args.slots_per_level)
        shares.append([mine / limit for mine, limit in zip(tested, reference, strict=True)])
        for what, limit, mine in zip(
            ('second', 'processor second'), reference, tested, strict=True
        ):
            rows.append([what, f'{limit:,.0f}', f'{mine:,.0f}', f'{mine / limit:.0%}'])
    print(machine.describe())
    print(f'`python -m benchmarks.evaluation {" ".join(sys.argv[1:])}`')
    headers = ['agent steps per', 'random actions alone', 'test mode', 'share']
    print(tabulate.tabulate(rows, headers, 'github'))
    medians = [round(statistics.median(share), 3) for share in zip(*shares, strict=True)]
    print(json.dumps(dict(zip(('share', 'share_of_processor_time'), medians, strict=True))))


if __name__ == '__main__':
    main()
