"""A learner with 10, 500 or 4,000 actors: simulates its network and its queue.

    python -m benchmarks.scaling

This only simulates, with service times that other benchmarks have measured: how long the learner's
machine is busy with receiving an unroll, sending the weights, and an update. `--actors` are
environments, `--envs_per_actor` of which make a job. A job sends its unrolls one by one, and waits
for room in the queue for each. After as many unrolls as it has environments, it reads the weights
if there are new ones. The learner's network serves one transfer at a time, first come first served.
The next batch is taken from the queue while the current one trains.
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

# Of the deep network in DeepMind Lab, as benchmarks/ingest.py sends them.
UNROLL_BYTES = 2_102_153
WEIGHTS_BYTES = 6_100_000


@dataclasses.dataclass(frozen=True)
class Setting:
    """Service times; all in seconds.

    Attributes:
      play: an environment plays an unroll, on average; a little more or less each time.
      take_in: the learner's machine receives an unroll.
      hand_out: it sends the weights to an actor.
      update: an update with one batch.
      batch_size: unrolls of an update.
      queue_capacity: unrolls.
    """

    play: float
    take_in: float
    hand_out: float
    update: float
    batch_size: int = 32
    queue_capacity: int = 32


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the simulation measures once it has settled.

    Attributes:
      unrolls_per_second: those learned from.
      reads_per_second: of the weights.
      network_load: share of time in which the network is busy.
      learner_load: share of time in which the learner trains.
      play_share: share of time in which an environment plays and does not wait.
      queue_lag: seconds from the last step of an unroll to its update, mean and 99th percentile.
      policy_lag: updates between the weights that acted and the weights being updated, likewise.
    """

    unrolls_per_second: float
    reads_per_second: float
    network_load: float
    learner_load: float
    play_share: float
    queue_lag: tuple[float, float]
    policy_lag: tuple[float, float]


@dataclasses.dataclass
class _Unroll:
    version: int
    played_at: float


class _Job:
    """An actor job, which sends its unrolls one by one."""

    def __init__(self) -> None:
        self.version = 0
        self.sent_with_it = 0
        self.outbox: collections.deque[_Unroll] = collections.deque()
        self.is_sending = False


def simulate(
    setting: Setting, num_jobs: int, envs_per_job: int = 1, updates: int = 600, seed: int = 1
) -> Outcome:
    """Simulates updates; the first third is not measured.

    Args:
      setting: the service times.
      num_jobs: actor jobs.
      envs_per_job: environments of each.
      updates: to simulate.
      seed: of how long unrolls take.
    """
    dice = random.Random(seed)
    order = itertools.count()
    events: list[tuple[float, int, str, _Job | None, _Unroll | None]] = []

    def at(time: float, what: str, job: _Job | None = None, unroll: _Unroll | None = None) -> None:
        heapq.heappush(events, (time, next(order), what, job, unroll))

    network_free = 0.0
    network_busy = learner_busy = played = 0.0
    now = settled_at = busy_before = 0.0
    settled = False

    def pass_network(seconds: float) -> float:
        nonlocal network_free, network_busy
        network_free = max(now, network_free) + seconds
        network_busy += seconds
        return network_free

    def network_busy_so_far() -> float:
        # Without what waits for the network.
        return network_busy - max(0.0, network_free - now)

    version = reads = 0
    queue: collections.deque[_Unroll] = collections.deque()
    waiting: collections.deque[tuple[_Job, _Unroll]] = collections.deque()
    batch_ahead: list[_Unroll] = []
    is_training = False
    queue_lags: list[float] = []
    policy_lags: list[int] = []
    for _ in range(num_jobs):
        job = _Job()
        for _ in range(envs_per_job):
            at(dice.uniform(0, setting.play), 'play', job)
    while version < updates:
        now, _, what, job_of_event, unroll = heapq.heappop(events)
        if version >= updates // 3 and not settled:
            settled, settled_at, busy_before = True, now, network_busy_so_far()
        if what == 'trained':
            version += 1
            is_training = False
        else:
            assert job_of_event is not None
            job = job_of_event
            if what == 'play':
                seconds = setting.play * dice.uniform(0.8, 1.2)
                played += seconds if settled else 0
                at(now + seconds, 'played', job, _Unroll(job.version, now + seconds))
            elif what == 'played':
                assert unroll is not None
                job.outbox.append(unroll)
            elif what == 'arrived':
                assert unroll is not None
                waiting.append((job, unroll))
            elif what == 'sent':
                # A job that waits for room sends nothing else meanwhile.
                job.is_sending = False
                at(now, 'play', job)
            if job.outbox and not job.is_sending:
                job.is_sending = True
                at(pass_network(setting.take_in), 'arrived', job, job.outbox.popleft())
        # Any event may have made room, or completed a batch.
        while True:
            if waiting and len(queue) < setting.queue_capacity:
                job, unroll = waiting.popleft()
                queue.append(unroll)
                job.sent_with_it += 1
                reading = job.version != version and job.sent_with_it >= envs_per_job
                if reading:
                    job.version, job.sent_with_it = version, 0
                reads += reading and settled
                at(pass_network(setting.hand_out) if reading else now, 'sent', job)
            elif len(batch_ahead) < setting.batch_size and queue:
                batch_ahead.append(queue.popleft())
            elif len(batch_ahead) == setting.batch_size and not is_training:
                if settled:
                    queue_lags += [now - each.played_at for each in batch_ahead]
                    policy_lags += [version - each.version for each in batch_ahead]
                    learner_busy += setting.update
                batch_ahead = []
                is_training = True
                at(now + setting.update, 'trained')
            else:
                break
    elapsed = now - settled_at
    return Outcome(
        len(queue_lags) / elapsed,
        reads / elapsed,
        (network_busy_so_far() - busy_before) / elapsed,
        min(1.0, learner_busy / elapsed),
        min(1.0, played / elapsed / (num_jobs * envs_per_job)),
        (float(np.mean(queue_lags)), float(np.percentile(queue_lags, 99))),
        (float(np.mean(policy_lags)), float(np.percentile(policy_lags, 99))),
    )


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--actors', default='10,500,4000', help='numbers of environments')
    parser.add_argument('--envs_per_actor', default='1')
    parser.add_argument('--learners', default='1', help='among which actors are shared out')
    parser.add_argument('--unroll_length', type=int, default=100)
    parser.add_argument(
        '--steps_per_second', type=float, default=125, help='agent steps of one environment'
    )
    parser.add_argument('--take_in_ms', type=float, default=1.46, help='of an unroll')
    parser.add_argument('--hand_out_ms', type=float, default=5.9, help='of the weights')
    parser.add_argument('--update_ms', type=float, default=51.2, help='of a batch')
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--queue_capacity', type=int, default=32)
    args = parser.parse_args()
    setting = Setting(
        args.unroll_length / args.steps_per_second,
        args.take_in_ms / 1000,
        args.hand_out_ms / 1000,
        args.update_ms / 1000,
        args.batch_size,
        args.queue_capacity,
    )
    rows = []
    steps = []
    for actors, envs, learners in itertools.product(
        *(map(int, each.split(',')) for each in (args.actors, args.envs_per_actor, args.learners))
    ):
        jobs = actors // envs // learners
        if not jobs:
            continue
        stages.begin(f'{jobs * learners:,} jobs of {envs}')
        outcome = simulate(setting, jobs, envs)
        steps.append(round(outcome.unrolls_per_second * learners * args.unroll_length))
        rows.append(
            [
                f'{actors:,}',
                f'{jobs * learners:,} of {envs}',
                learners,
                f'{steps[-1]:,}',
                f'{outcome.unrolls_per_second * UNROLL_BYTES / 1e6:,.0f}',
                f'{outcome.reads_per_second * WEIGHTS_BYTES / 1e6:,.0f}',
                f'{outcome.network_load:.0%}',
                f'{outcome.learner_load:.0%}',
                f'{outcome.play_share:.0%}',
                '{:.2f} / {:.2f}'.format(*outcome.queue_lag),
                '{:.1f} / {:.0f}'.format(*outcome.policy_lag),
            ]
        )
    print(f'`python -m benchmarks.scaling {" ".join(sys.argv[1:])}`')
    headers = [
        'actors', 'jobs', 'learners', 'agent steps/s', 'unrolls MB/s', 'weights MB/s',
        'network busy', 'learner busy', 'actors play', 'queue lag s, mean / 99%',
        'policy lag, mean / 99%',
    ]  # fmt: skip
    print(tabulate.tabulate(rows, headers, 'github', disable_numparse=True))
    print(json.dumps({'agent_steps_per_second': steps}))


if __name__ == '__main__':
    main()
