"""Agent steps a second of the machinery when environment and network cost nothing.

    python -m benchmarks.infrastructure --num_actors=32 --seconds=20

Real: actor processes, shared memory, batcher op, queue, batches of 32 x 101 rows that reach a
learner step. Not real: the environment returns a fixed 72x96x3 frame at once, the agent has
almost no network, and the learner step only touches its batch.
"""

import argparse
import contextlib
import json
import os
import sys
import time

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tabulate
import tensorflow as tf

from benchmarks import machine, stages
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


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--num_actors', type=int, default=32)
    parser.add_argument('--seconds', type=float, default=20)
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--unroll_length', type=int, default=100)
    parser.add_argument('--inference_batch_size', type=int, default=0, help='0: half the actors')
    args = parser.parse_args()
    stages.begin(f'{args.num_actors} actors play for {args.seconds:g} s')
    steps_per_second, seconds_of_stages = measure(
        args.num_actors,
        args.seconds,
        args.batch_size,
        args.unroll_length,
        args.inference_batch_size or args.num_actors // 2,
    )
    print(machine.describe())
    print(f'`python -m benchmarks.infrastructure {" ".join(sys.argv[1:])}`')
    rows = [[stage, f'{total / args.seconds:.2f}'] for stage, total in seconds_of_stages.items()]
    print(tabulate.tabulate(rows, ['stage', 'seconds per second'], 'github'))
    print(json.dumps({'agent_steps_per_second': round(steps_per_second)}))


if __name__ == '__main__':
    main()
