"""A learner that acts for 500 environments and more: simulates `--inference=learner`.

    python -m benchmarks.central_scaling

As `benchmarks/scaling.py`, which simulates `--inference=actor`, this only simulates. A job has a
number of cores and at least twice as many environments, in two groups. A step occupies a core; when
all environments of a group have stepped, their rows travel to the learner, whose network serves one
call at a time. A batch of inference has all rows that have arrived by then. Its time, and that of
an update, are those of one device or of two.
"""

import argparse
import collections
import dataclasses
import heapq
import itertools
import json
import os
import random
import sys

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tabulate

from benchmarks import stages

# Of a row of the deep network in DeepMind Lab.
ROW_BYTES = 20_768


@dataclasses.dataclass(frozen=True)
class Setting:
    """Service times; all in seconds.

    Attributes:
      step: an environment steps, on average; a fifth more or less each time.
      take_in: the learner's machine receives a row.
      round_trip: between job and learner.
      batch: a batch of inference, without its rows.
      row: a row of it.
      update: an update with one batch of unrolls.
      one_device: whether inference and updates wait for each other.
      unroll_length: agent steps.
      batch_size: unrolls of an update.
      queue_capacity: unrolls.
    """

    step: float
    take_in: float
    round_trip: float
    batch: float
    row: float
    update: float
    one_device: bool
    unroll_length: int = 100
    batch_size: int = 32
    queue_capacity: int = 32


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the simulation measures once it has settled.

    Attributes:
      steps_per_second: agent steps learned from.
      network_load: share of time in which the learner's network is busy.
      inference_load: share of time in which the policy computes.
      learner_load: share of time in which the learner trains.
      core_load: share of time in which the jobs' cores step environments.
      batch_rows: rows of a batch of inference, on average.
      policy_lag: updates between the weights that began an unroll and those being updated, mean
        and 99th percentile.
    """

    steps_per_second: float
    network_load: float
    inference_load: float
    learner_load: float
    core_load: float
    batch_rows: float
    policy_lag: tuple[float, float]


class _Job:
    def __init__(self, cores: int):
        self.free_cores = cores
        # Environments that have an action and wait for a core.
        self.ready: collections.deque[int] = collections.deque()


@dataclasses.dataclass
class _Environment:
    job: _Job
    group: '_Group'
    row: int  # Of its unroll.
    version: int = 0  # That acted in row 0.


class _Group:
    def __init__(self) -> None:
        self.environments: list[int] = []
        self.num_stepping = 0


def simulate(
    setting: Setting, num_jobs: int, cores: int, updates: int = 300, envs_per_core: int = 2
) -> Outcome:
    """Simulates updates; the first third is not measured.

    Args:
      setting: the service times.
      num_jobs: actor jobs.
      cores: of each job.
      updates: to simulate.
      envs_per_core: environments of a job per core, of both groups together.
    """
    dice = random.Random(1)
    order = itertools.count()
    events: list[tuple[float, int, str, object]] = []
    now = 0.0

    def at(time: float, what: str, subject: object = None) -> None:
        heapq.heappush(events, (time, next(order), what, subject))

    environments: list[_Environment] = []
    for _ in range(num_jobs):
        job = _Job(cores)
        for _ in range(2):
            group = _Group()
            for _ in range(cores * envs_per_core // 2):
                group.environments.append(len(environments))
                # Environments that begin together end their unrolls together.
                row = dice.randrange(setting.unroll_length)
                environments.append(_Environment(job, group, row))
            job.ready.extend(group.environments)
            group.num_stepping = len(group.environments)
    busy = dict.fromkeys(('core', 'network', 'inference', 'learner'), 0.0)
    settled_at, busy_before = 0.0, busy.copy()
    network_free = 0.0
    version = num_learned = num_batches = num_rows = 0
    waiting: list[int] = []  # Rows that have arrived.
    full: collections.deque[int] = collections.deque()  # Environments whose unroll has no room.
    queue: collections.deque[int] = collections.deque()  # Versions of unrolls.
    ahead: list[int] = []
    lags: list[int] = []
    is_acting = is_training = False

    def use_cores(job: _Job) -> None:
        while job.free_cores and job.ready:
            job.free_cores -= 1
            seconds = setting.step * dice.uniform(0.8, 1.2)
            busy['core'] += seconds
            at(now + seconds, 'stepped', job.ready.popleft())

    def answer(number: int) -> None:
        environment = environments[number]
        if environment.row == 0:
            environment.version = version
        environment.row += 1
        group = environment.group
        group.num_stepping += 1
        if group.num_stepping == len(group.environments):
            at(now + setting.round_trip / 2, 'answered', group)

    for environment in environments:
        use_cores(environment.job)
    while version < updates:
        now, _, what, subject = heapq.heappop(events)
        if version == updates // 3 and not settled_at:
            settled_at, busy_before, num_learned, num_batches, num_rows = now, busy.copy(), 0, 0, 0
            lags.clear()
        if what == 'stepped':
            environment = environments[subject]  # type: ignore[call-overload]
            environment.job.free_cores += 1
            group = environment.group
            group.num_stepping -= 1
            if group.num_stepping == 0:
                seconds = setting.take_in * len(group.environments)
                network_free = max(network_free, now + setting.round_trip / 2) + seconds
                busy['network'] += seconds
                at(network_free, 'arrived', group)
            use_cores(environment.job)
        elif what == 'answered':
            assert isinstance(subject, _Group)
            job = environments[subject.environments[0]].job
            job.ready.extend(subject.environments)
            use_cores(job)
        elif what == 'arrived':
            assert isinstance(subject, _Group)
            for number in subject.environments:
                is_full = environments[number].row == setting.unroll_length
                (full if is_full else waiting).append(number)
        elif what == 'acted':
            is_acting = False
            for number in subject:  # type: ignore[attr-defined]
                answer(number)
        elif what == 'trained':
            is_training = False
            version += 1
        while full and len(queue) < setting.queue_capacity:
            number = full.popleft()
            queue.append(environments[number].version)
            environments[number].row = 0
            waiting.append(number)
        while len(ahead) < setting.batch_size and queue:
            ahead.append(queue.popleft())
        is_free = not (setting.one_device and (is_acting or is_training))
        if waiting and not is_acting and is_free:
            seconds = setting.batch + setting.row * len(waiting)
            busy['inference'] += seconds
            num_batches += 1
            num_rows += len(waiting)
            is_acting, is_free = True, not setting.one_device
            at(now + seconds, 'acted', waiting)
            waiting = []
        if len(ahead) == setting.batch_size and not is_training and is_free:
            lags += [version - each for each in ahead]
            num_learned += len(ahead)
            ahead = []
            is_training = True
            busy['learner'] += setting.update
            at(now + setting.update, 'trained')
    elapsed = now - settled_at
    busy = {name: busy[name] - busy_before[name] for name in busy}
    return Outcome(
        num_learned * setting.unroll_length / elapsed,
        busy['network'] / elapsed,
        busy['inference'] / elapsed,
        busy['learner'] / elapsed,
        busy['core'] / elapsed / (num_jobs * cores),
        num_rows / max(1, num_batches),
        (float(np.mean(lags)), float(np.percentile(lags, 99))),
    )


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--jobs', type=int, default=10)
    parser.add_argument('--cores', type=int, default=50, help='of a job')
    parser.add_argument('--envs_per_core', type=int, default=2)
    parser.add_argument('--step_ms', type=float, default=8, help='of an environment on a core')
    parser.add_argument('--take_in_us', default='6.6,40', help='of a row')
    parser.add_argument('--round_trip_ms', default='0.2,40')
    parser.add_argument('--batch_ms', type=float, default=1, help='of inference, without its rows')
    parser.add_argument('--row_us', type=float, default=5.3, help='of inference')
    parser.add_argument('--update_ms', type=float, default=51.2)
    args = parser.parse_args()
    rows, steps = [], []
    for take_in, round_trip, one_device in itertools.product(
        map(float, args.take_in_us.split(',')),
        map(float, args.round_trip_ms.split(',')),
        (False, True),
    ):
        stages.begin(f'{take_in:g} µs a row, {round_trip:g} ms, {2 - one_device} devices')
        setting = Setting(
            args.step_ms / 1e3,
            take_in / 1e6,
            round_trip / 1e3,
            args.batch_ms / 1e3,
            args.row_us / 1e6,
            args.update_ms / 1e3,
            one_device,
        )
        outcome = simulate(setting, args.jobs, args.cores, envs_per_core=args.envs_per_core)
        steps.append(round(outcome.steps_per_second))
        rows.append(
            [
                f'{take_in:g}',
                f'{round_trip:g}',
                'one' if one_device else 'two',
                f'{steps[-1]:,}',
                f'{outcome.steps_per_second * ROW_BYTES / 1e6:,.0f}',
                f'{outcome.network_load:.0%}',
                f'{outcome.inference_load:.0%}',
                f'{outcome.learner_load:.0%}',
                f'{outcome.core_load:.0%}',
                f'{outcome.batch_rows:.0f}',
                '{:.1f} / {:.0f}'.format(*outcome.policy_lag),
            ]
        )
    print(f'`python -m benchmarks.central_scaling {" ".join(sys.argv[1:])}`')
    headers = [
        'µs a row', 'round trip, ms', 'devices', 'agent steps/s', 'rows MB/s', 'network busy',
        'policy busy', 'learner busy', 'cores busy', 'rows of a batch', 'policy lag, mean / 99%',
    ]  # fmt: skip
    print(tabulate.tabulate(rows, headers, 'github', disable_numparse=True))
    print(json.dumps({'agent_steps_per_second': steps}))


if __name__ == '__main__':
    main()
