"""Agent steps a second of Atari alone: this project's environment, ale_py's vector one, EnvPool.

    python -m benchmarks.emulators --rounds=5

In turns, with all cores and random actions: a process per core with this project's environment, as
actors have it; `ale_py.vector_env.AtariVectorEnv`, threads in one process, whose environments step
together or half of them at a time; and EnvPool, likewise, if `--envpool` names a Python that has it
(`pip install envpool`). All repeat actions four times, take the maximum of two frames, and return a
stack of four of 84x84 pixels.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tabulate

from benchmarks import machine, stages, throughput

# Arguments: game, environments, environments per step, threads, seconds.
_BEGIN = """
import sys, time
import numpy as np
game, seconds = sys.argv[1], float(sys.argv[5])
num_envs, batch_size, threads = map(int, sys.argv[2:5])
"""
_LOOP = """
steps, started = 0, time.perf_counter()
while time.perf_counter() - started < seconds:
    ids = step(random.randint(0, num_actions, batch_size), ids)
    steps += batch_size
print(steps / (time.perf_counter() - started))
"""
_ALE = (
    _BEGIN
    + """
from ale_py.vector_env import AtariVectorEnv
envs = AtariVectorEnv(game, num_envs, batch_size=batch_size, num_threads=threads)
ids = envs.reset()[1]['env_id']
num_actions, random = envs.single_action_space.n, np.random.RandomState(0)
def step(actions, ids):
    # It remembers whose observations it returned last.
    envs.send(actions)
    return envs.recv()[-1]['env_id']
"""
    + _LOOP
)
_ENVPOOL = (
    _BEGIN
    + """
import envpool
name = ''.join(word.capitalize() for word in game.split('_'))
envs = envpool.make(name + '-v5', env_type='gymnasium', num_envs=num_envs, batch_size=batch_size,
                    num_threads=threads)
envs.async_reset()
ids = envs.recv()[-1]['env_id']
num_actions, random = envs.action_space.n, np.random.RandomState(0)
def step(actions, ids):
    envs.send(actions, ids)
    return envs.recv()[-1]['env_id']
"""
    + _LOOP
)


def vector_rate(
    python: str, code: str, game: str, num_envs: int, batch_size: int, seconds: float
) -> float:
    """Returns agent steps per second of a vector environment on all cores."""
    numbers = (num_envs, batch_size, throughput.CORES, seconds)
    command = [python, '-c', code, game, *map(str, numbers)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return float(output.splitlines()[-1])


def camel_case(game: str) -> str:
    """Returns the name of a game in the ids of Gymnasium: `space_invaders` is `SpaceInvaders`."""
    return ''.join(word.capitalize() for word in game.split('_'))


def main() -> None:
    """Prints one table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--game', default='pong', help='for instance space_invaders')
    parser.add_argument('--num_envs', type=int, default=32)
    parser.add_argument('--seconds', type=float, default=5, help='of each measurement')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--envpool', metavar='PYTHON', help='a Python with EnvPool')
    args = parser.parse_args()
    level = f'--level_name=ALE/{camel_case(args.game)}-v5'
    half = args.num_envs // 2
    vector = {'ale_py, together': (sys.executable, _ALE, args.num_envs)}
    vector['ale_py, half at a time'] = (sys.executable, _ALE, half)
    if args.envpool:
        vector['EnvPool, together'] = (args.envpool, _ENVPOOL, args.num_envs)
        vector['EnvPool, half at a time'] = (args.envpool, _ENVPOOL, half)
    rates: dict[str, list[float]] = {'this project': [], **{name: [] for name in vector}}
    for number in range(args.rounds):
        stages.begin(f'round {number + 1} of {args.rounds}')
        rates['this project'].append(throughput.environment_rate([level], args.seconds))
        for name, (python, code, batch_size) in vector.items():
            rates[name].append(
                vector_rate(python, code, args.game, args.num_envs, batch_size, args.seconds)
            )
    print(machine.describe())
    print(f'`python -m benchmarks.emulators {" ".join(sys.argv[1:])}`')
    ours = rates['this project']
    table = []
    for name, values in rates.items():
        ratios = [f'{value / own:.2f}' for value, own in zip(values, ours, strict=True)]
        table.append([name, f'{statistics.median(values):,.0f}', ' '.join(ratios)])
    headers = ['environment', 'agent steps/s, all cores', "share of this project's, each round"]
    print(tabulate.tabulate(table, headers, 'github', disable_numparse=True))
    print(json.dumps({name: round(statistics.median(values)) for name, values in rates.items()}))


if __name__ == '__main__':
    main()
