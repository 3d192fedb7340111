"""The fuzzer's command; see `runner`."""

import argparse
import collections
import itertools
import pathlib
import random
import sys
import tempfile
from collections.abc import Iterable

import tqdm

TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from fuzz import runner  # noqa: E402


def main() -> int:
    """Fuzzes as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(description='Fuzzes experiment.py.')
    parser.add_argument('--seed', type=int, default=random.randrange(10**6))
    parser.add_argument('--first', type=int, default=0, help='number of the first case')
    parser.add_argument('--cases', type=int, help='how many; until Ctrl-C without it')
    arguments = parser.parse_args()
    print(f'Seed {arguments.seed}', flush=True)
    numbers: Iterable[int] = itertools.count(arguments.first)
    if arguments.cases is not None:
        numbers = range(arguments.first, arguments.first + arguments.cases)
    answers: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix='fuzz-') as folder:
        own = pathlib.Path(folder)
        template = runner.finished_run(own / 'template')
        results = runner.fuzz(arguments.seed, numbers, own, template)
        try:
            for number, answer, fault in tqdm.tqdm(results, total=arguments.cases, unit='case'):
                answers[answer or 'FAILED'] += 1
                if fault:
                    command = runner.repeat_command(arguments.seed, number)
                    tqdm.tqdm.write(f'\nFAILED: {command}\n{fault}\n')
        except KeyboardInterrupt:
            pass
    print(', '.join(f'{count} {answer}' for answer, count in answers.items()))
    return 1 if answers['FAILED'] else 0


if __name__ == '__main__':
    sys.exit(main())
