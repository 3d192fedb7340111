"""Inputs from a grammar are refused in one sentence or succeed; see `tests/fuzz/runner.py`."""

import os

import pytest
from fuzz import runner

# The same cases each time; `python tests/fuzz` tries new ones until it is stopped.
SEED = int(os.environ.get('FUZZ_SEED', '20'))
CASES = 200
CASES_PER_TEST = 10


@pytest.fixture(scope='module')
def template(tmp_path_factory):
    """The logdir of a finished run."""
    return runner.finished_run(tmp_path_factory.mktemp('template'))


@pytest.mark.parametrize('first', range(0, CASES, CASES_PER_TEST))
def test_every_input_is_refused_in_one_sentence_or_succeeds(tmp_path, template, first):
    print(f'Seed {SEED}')
    answers, faults = set(), []
    numbers = range(first, first + CASES_PER_TEST)
    for number, answer, fault in runner.fuzz(SEED, numbers, tmp_path, template):
        answers.add(answer)
        if fault:
            faults.append(f'{runner.repeat_command(SEED, number)}\n{fault}')
    assert not faults, '\n\n'.join(faults)
    # If nothing is refused, the grammar no longer makes wrong inputs.
    assert runner.REFUSED in answers
