"""Agent steps a second of the machinery when environment and network cost nothing.

    python -m benchmarks.infrastructure --num_actors=32 --seconds=20

Real: actor processes, shared memory, batcher op, queue, batches of 32 x 101 rows that reach a
learner step. Not real: the environment returns a fixed 72x96x3 frame at once, the agent has
almost no network, and the learner step only touches its batch.

In turns with it runs `handover.cc`, a bare C++ program that hands frames of the same size from as
many processes to one reader: the limit of a machine. `--rounds` repeats both.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tabulate
import tensorflow as tf

from benchmarks import fixed_frame, machine, stages
from impala.acting.actor_pool import ActorPool
from impala.acting.actor_processes import ActorHost
from impala.acting.behaviour_policy import BehaviourPolicy, UnrollSource
from impala.environments import EnvironmentConfig
from impala.trajectory import AgentOutput

LEVEL = 'benchmarks.fixed_frame:make'


class TinyAgent(tf.Module):
    """Draws actions from a policy that depends on its bias only."""

    state_spec = ()

    def __init__(self, num_actions: int):
        super().__init__()
        self._bias = tf.Variable(tf.zeros([num_actions]))

    @property
    def acting_variables(self):
        return self.trainable_variables

    def step(self, prev_action, env_output, state):
        logits = tf.zeros([tf.shape(prev_action)[0], 1]) + self._bias
        action = tf.random.categorical(logits, 1, dtype=tf.int32)[:, 0]
        return AgentOutput(action, logits, env_output.reward), state


@tf.function
def touch(batch):
    """Reads a line of pixels of every frame of a batch."""
    frames = batch.actor_output.env_outputs.observation['frame']
    return tf.reduce_sum(tf.cast(frames[:, :, 0], tf.int32))


def measure(
    num_actors: int, seconds: float, batch_size: int, unroll_length: int, inference_batch_size: int
) -> tuple[float, dict[str, float]]:
    """Returns agent steps per second, and the seconds of each stage meanwhile."""
    with contextlib.ExitStack() as stack:
        actor_host = stack.enter_context(ActorHost(EnvironmentConfig()))
        spec = actor_host.environment_spec(LEVEL, seed=1)
        agent = TinyAgent(spec.num_actions)
        source = UnrollSource(
            spec, agent, [0] * num_actors, unroll_length, 1, inference_batch_size, timeout_ms=20
        )
        behaviour = BehaviourPolicy(agent, source)
        stack.enter_context(behaviour.serving())
        stack.enter_context(
            ActorPool(actor_host, source.batcher, [LEVEL] * num_actors, 1, 0, print)
        )
        batches = source.batches(batch_size)
        for _ in range(3):
            touch(next(batches))
        before = source.batcher.statistics().stage_seconds
        started = time.perf_counter()
        steps = 0
        while time.perf_counter() - started < seconds:
            touch(next(batches))
            steps += batch_size * unroll_length
        elapsed = time.perf_counter() - started
        after = source.batcher.statistics().stage_seconds
    return steps / elapsed, {stage: after[stage] - before[stage] for stage in after}


def build_probe(folder: str) -> str:
    """Compiles the bare hand-over; returns the path of the program."""
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'handover.cc')
    program = os.path.join(folder, 'handover')
    subprocess.run(['g++', '-O2', '-std=c++17', '-o', program, source], check=True)
    return program


def bare_rate(program: str, num_actors: int, inference_batch_size: int, seconds: float) -> float:
    """Returns frames per second of the bare hand-over, for frames as in `measure`."""
    frame = fixed_frame.FixedFrame.spec.observation['frame']
    numbers = (num_actors, inference_batch_size, math.prod(frame.shape), seconds)
    output = subprocess.run(
        [program, *map(str, numbers)], stdout=subprocess.PIPE, check=True, text=True
    ).stdout
    return float(output)


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--num_actors', type=int, default=32)
    parser.add_argument('--seconds', type=float, default=20)
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--unroll_length', type=int, default=100)
    parser.add_argument('--inference_batch_size', type=int, default=0, help='0: half the actors')
    parser.add_argument('--rounds', type=int, default=1)
    args = parser.parse_args()
    batch_size = args.inference_batch_size or args.num_actors // 2
    rates, bare, stage_seconds = [], [], []
    with tempfile.TemporaryDirectory(prefix='impala-benchmark-') as folder:
        program = build_probe(folder)
        for _ in range(args.rounds):
            stages.begin(f'{args.num_actors} actors play for {args.seconds:g} s')
            rate, seconds_of_stages = measure(
                args.num_actors, args.seconds, args.batch_size, args.unroll_length, batch_size
            )
            rates.append(rate)
            stage_seconds.append(seconds_of_stages)
            stages.begin(f'the bare hand-over, {args.seconds / 2:g} s')
            bare.append(bare_rate(program, args.num_actors, batch_size, args.seconds / 2))
    print(machine.describe())
    print(f'`python -m benchmarks.infrastructure {" ".join(sys.argv[1:])}`')
    rows = [
        [stage, f'{statistics.median(s[stage] for s in stage_seconds) / args.seconds:.2f}']
        for stage in stage_seconds[0]
    ]
    print(tabulate.tabulate(rows, ['stage', 'seconds per second'], 'github'))
    shares = [round(rate / limit, 3) for rate, limit in zip(rates, bare, strict=True)]
    rate, limit = round(statistics.median(rates)), round(statistics.median(bare))
    print(f'{rate:,} agent steps/s; bare hand-over: {limit:,} frames/s; shares: {shares}')
    result = {'agent_steps_per_second': rate, 'bare': limit, 'share': statistics.median(shares)}
    print(json.dumps(result))


if __name__ == '__main__':
    main()
