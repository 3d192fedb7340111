"""Whether test mode scores a policy like training with a learning rate of 0.

    python -m benchmarks.score_agreement

writes `docs/results/score_agreement.md`. For each case `experiment.py` trains for a while, resumes
in the same folder with a learning rate of 0, and tests the checkpoint. The returns of the second
phase, from `episodes.csv`, and those of the test are of the same policy.

`episodes.csv` lacks the episode that each environment was in when the phase ended, and those are
likely to be long ones. There are at most as many as environments, so their number times the range
of returns, over the number of episodes, bounds the change of the mean; it is in the table. The
beginning needs no care: a resumed run starts new episodes in all environments.
"""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile

# Found whether this runs as a module or as a file.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tabulate

from benchmarks import machine, stages
from impala.runs.files import read_episodes
from impala.suites import scores

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGE = os.path.join(ROOT, 'docs', 'results', 'score_agreement.md')
ENVIRONMENTS = 8
COMMON = (
    f'--num_actors={ENVIRONMENTS}',
    '--envs_per_process=4',
    '--batch_size=8',
    '--unroll_length=20',
    '--gradient_clip_norm=40',
    '--epsilon=0.01',
    '--entropy_cost=0.01',
    '--intra_op_threads=1',
)
# Level -> its flags; frames to train, frames after both phases, episodes of the test.
CASES = {
    'CartPole-v1': (('--learning_rate=0.003',), 60_000, 160_000, 600),
    'ALE/Breakout-v5': (
        ('--learning_rate=0.0006', '--torso=shallow', '--reward_clipping=abs_one'),
        10_000,
        130_000,
        120,
    ),
}


def experiment(*flags: str) -> None:
    """Runs experiment.py; ends the program if it fails."""
    run = subprocess.run(
        [sys.executable, 'experiment.py', *flags],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if run.returncode:
        sys.exit(f'experiment.py {shlex.join(flags)} has failed:\n{run.stdout}')


def difference_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Returns the 95% bootstrap interval of the difference of two means, second minus first."""
    random = np.random.default_rng(0)
    means = [
        returns[random.integers(len(returns), size=(2000, len(returns)))].mean(1)
        for returns in (first, second)
    ]
    low, high = np.percentile(means[1] - means[0], [2.5, 97.5])
    return float(low), float(high)


def compare(level_name: str, logdir: str) -> tuple[list[list[str]], str]:
    """Trains and tests; returns rows of the table and a sentence."""
    flags, before, after, num_episodes = CASES[level_name]
    run = (f'--logdir={logdir}', f'--level_name={level_name}', *COMMON, *flags)
    stages.begin(f'{level_name}: training')
    experiment(*run, f'--total_environment_frames={before}')
    last_frames = max((row['frames'] for row in read_episodes(logdir)), default=0)
    stages.begin(f'{level_name}: training at a learning rate of 0')
    experiment(*run, f'--total_environment_frames={after}', '--learning_rate=0')
    # Rows of the second phase are of later updates than the last one of the first.
    trained = np.array(
        [row['return'] for row in read_episodes(logdir) if row['frames'] > max(before, last_frames)]
    )
    stages.begin(f'{level_name}: a test')
    experiment('--mode=test', f'--logdir={logdir}', f'--test_num_episodes={num_episodes}')
    with open(os.path.join(logdir, 'test_scores.json'), encoding='utf-8') as file:
        tested = np.array(json.load(file)['levels'][level_name]['returns'])
    everything = np.concatenate([trained, tested])
    bound = ENVIRONMENTS * float(np.ptp(everything)) / len(trained)
    rows = []
    for what, returns, missing in (
        ('training at learning rate 0', trained, f'{bound:.2f}'),
        ('`--mode=test`', tested, '0'),
    ):
        interval = scores.mean_interval(returns.tolist())
        low, high = interval if interval is not None else (np.nan, np.nan)
        rows.append(
            [
                level_name,
                what,
                f'{len(returns):,}',
                f'{returns.mean():.2f}',
                f'{low:.2f} to {high:.2f}',
                f'{returns.std():.2f}',
                missing,
            ]
        )
    low, high = difference_interval(trained, tested)
    agree = low <= 0 <= high
    sentence = (
        f'- **{level_name}**: the mean of the test is {tested.mean() - trained.mean():+.2f} off '
        f'(95% interval {low:.2f} to {high:.2f}): they {"agree" if agree else "do not agree"}.'
    )
    return rows, sentence


def main() -> None:
    """Runs the cases and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('levels', nargs='*', default=list(CASES), help=f'of {", ".join(CASES)}')
    parser.add_argument('--remark', default='', help='a sentence for the page')
    args = parser.parse_args()
    unknown = sorted({*args.levels} - {*CASES})
    if unknown:
        parser.error(f'{", ".join(unknown)}: there is no such case, only {", ".join(CASES)}')
    rows, sentences = [], []
    for level_name in args.levels:
        print(level_name, flush=True)
        with tempfile.TemporaryDirectory(prefix='impala-benchmark-') as folder:
            of_level, sentence = compare(level_name, os.path.join(folder, 'run'))
        rows += of_level
        sentences.append(sentence)
    headers = [
        'level', 'episodes of', 'number', 'mean return', '95% interval', 'standard deviation',
        'what unfinished episodes may change',
    ]  # fmt: skip
    commands = '\n'.join(
        f'    python experiment.py --level_name={name} {shlex.join((*COMMON, *flags))} \\\n'
        f'        --total_environment_frames={before}\n'
        f'    # again with --total_environment_frames={after} --learning_rate=0, then\n'
        f'    python experiment.py --mode=test --test_num_episodes={num_episodes}\n'
        for name in args.levels
        for flags, before, after, num_episodes in [CASES[name]]
    )
    page = f"""# Test mode agrees with training that learns nothing

{machine.describe()}, no GPU, {datetime.date.today()}, one seed. {args.remark}

    python -m benchmarks.score_agreement {' '.join(args.levels)}

A policy is trained for a moment, then frozen with a learning rate of 0 while training continues,
then tested. `episodes.csv` of the second phase and `--mode=test` must agree, although actors, seeds
and the ends of episodes differ. 95% bootstrap intervals.

{tabulate.tabulate(rows, headers, 'github', disable_numparse=True)}

{chr(10).join(sentences)}

`episodes.csv` lacks the episodes in which the phase ended: at most one per environment, and rather
long ones. The last column bounds their effect on the mean (their greatest number, times the range
of the returns seen, over the number of episodes). A test has no such bias: its episodes are chosen
beforehand.

The runs, each with its own `--logdir`:

{commands}"""
    with open(PAGE, 'w', encoding='utf-8') as file:
        file.write(page)
    print(page)


if __name__ == '__main__':
    main()
