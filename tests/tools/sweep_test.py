"""Sweeps: how they sample and decide, and real ones that are killed and resumed."""

import contextlib
import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import psutil
import pytest
from processes import is_running
from scipy import stats
from warm_process import WarmProcess

from impala import suites
from impala.runs.files import LogdirError
from impala.tools import plot
from impala.tools.sweep import config as sweep_config
from impala.tools.sweep import report as sweep_report
from impala.tools.sweep import state as sweep_state
from impala.tools.sweep import sweep

TESTS = pathlib.Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PATIENCE_SECONDS = 300

SPACE = {
    'entropy_cost': {'log_uniform': [5e-5, 1e-2]},
    'learning_rate': {'log_uniform': [5e-6, 5e-3]},
    'epsilon': {'choice': [1e-1, 1e-3, 1e-5, 1e-7]},
}
FLAGS = {
    'level_name': 'CartPole-v1',
    'total_environment_frames': 12000,
    'num_actors': 4,
    'envs_per_process': 4,
    'batch_size': 4,
    'unroll_length': 20,
    'log_secs': 0.2,
}
RANDOM = {'method': 'random', 'members': 2, 'flags': FLAGS, 'space': SPACE}
PBT = RANDOM | {'method': 'pbt', 'pbt': {'round_frames': 6000}}


def write(folder, content):
    path = folder / 'search.json'
    path.write_text(json.dumps(content))
    return str(path)


def settings(**changes):
    return sweep_config.PBTConfig(round_frames=1, **changes)


def test_a_sweep_itself_does_not_import_tensorflow():
    # It would cost hundreds of megabytes, and its threads make forking unsafe.
    code = 'import sys, impala.tools.sweep.sweep; sys.exit("tensorflow" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize('name', ['sweep_random', 'pbt', 'sweep_dmlab30'])
def test_shipped_sweeps_can_be_read(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = sweep_config.read(f'configs/{name}.json')
    # Table D.1 of the paper.
    assert {name: (d.kind, d.values) for name, d in config.space.items()} == {
        'entropy_cost': ('log_uniform', (5e-5, 1e-2)),
        'learning_rate': ('log_uniform', (5e-6, 5e-3)),
        'epsilon': ('choice', (1e-1, 1e-3, 1e-5, 1e-7)),
    }


def test_members_are_samples_of_the_space(tmp_path):
    space = SPACE | {'discounting': {'uniform': [0.9, 0.99]}}
    config = sweep_config.read(write(tmp_path, RANDOM | {'space': space}))
    members = [config.sample(index) for index in range(3000)]
    columns = {name: np.array([member[name] for member in members]) for name in space}
    for name, (low, high) in {'entropy_cost': (5e-5, 1e-2), 'learning_rate': (5e-6, 5e-3)}.items():
        assert stats.kstest(columns[name], stats.loguniform(low, high).cdf).pvalue > 0.001
    assert stats.kstest(columns['discounting'], stats.uniform(0.9, 0.09).cdf).pvalue > 0.001
    values, counts = np.unique(columns['epsilon'], return_counts=True)
    assert values.tolist() == [1e-7, 1e-5, 1e-3, 1e-1]
    assert stats.chisquare(counts).pvalue > 0.001
    logs = np.log([columns['entropy_cost'], columns['learning_rate'], columns['epsilon']])
    assert np.abs(np.corrcoef(logs) - np.eye(3)).max() < 0.06
    # A member depends on the seed, but not on the number of members.
    assert config.sample(7) == members[7]
    other = sweep_config.read(write(tmp_path, RANDOM | {'seed': 2}))
    assert other.sample(7) != sweep_config.read(write(tmp_path, RANDOM)).sample(7)


def test_a_better_member_is_copied_and_a_worse_one_is_not():
    values = [{'learning_rate': 0.1}, {'learning_rate': 0.2}]
    keep = settings(margin=5.0, perturb_probability=0.0)
    random = np.random.default_rng(1)
    for fitness, expected in {
        (10.0, 15.1): [(1, values[1]), (None, values[1])],
        (10.0, 15.0): [(None, values[0]), (None, values[1])],
        (15.1, 10.0): [(None, values[0]), (0, values[0])],
        # One of them has no fitness.
        (None, 15.0): [(None, values[0]), (None, values[1])],
    }.items():
        assert sweep.evolve(fitness, [False] * 2, values, False, keep, random) == expected
        kept = [(None, values[0]), (None, values[1])]
        assert sweep.evolve(fitness, [False] * 2, values, True, keep, random) == kept
    # A failed member copies another one, even during burn-in.
    assert sweep.evolve([None, 1.0], [True, False], values, True, keep, random) == [
        (1, values[1]),
        (None, values[1]),
    ]


def test_members_are_compared_with_random_others():
    values = [{'epsilon': float(i)} for i in range(4)]
    random = np.random.default_rng(1)
    keep = settings(perturb_probability=0.0)
    sources = [
        sweep.evolve(
            [1.0, 2.0, 3.0, None], [False, False, False, True], values, False, keep, random
        )
        for _ in range(600)
    ]
    # The first is worse than both members it may draw, the second is worse than one.
    first, second, third, fourth = ([s[i][0] for s in sources] for i in range(4))
    assert set(first) == {1, 2} and 240 < first.count(1) < 360
    assert set(second) == {None, 2} and 240 < second.count(2) < 360
    assert set(third) == {None}
    assert set(fourth) == {0, 1, 2}


def test_hyperparameters_are_multiplied_or_divided():
    values = [{'learning_rate': 1.0, 'epsilon': 0.1}] * 2
    random = np.random.default_rng(1)
    explored = [
        sweep.evolve([1.0, 1.0], [False] * 2, values, False, settings(), random)
        for _ in range(5000)
    ]
    rates = [new['learning_rate'] for decisions in explored for _, new in decisions]
    unchanged, up, down = rates.count(1.0), rates.count(1.2), rates.count(1 / 1.2)
    assert unchanged + up + down == 10000
    # A third changes, up as often as down: an unbiased walk in the logarithm.
    assert stats.binomtest(up + down, 10000, 0.33).pvalue > 0.001
    assert stats.binomtest(up, up + down, 0.5).pvalue > 0.001
    epsilons = {round(new['epsilon'], 6) for decisions in explored for _, new in decisions}
    assert epsilons == {0.1, 0.12, 0.083333}
    together = sum(
        new['learning_rate'] != 1 and new['epsilon'] != 0.1 for d in explored for _, new in d
    )
    assert stats.binomtest(together, 10000, 0.33**2).pvalue > 0.001
    assert values[0] == {'learning_rate': 1.0, 'epsilon': 0.1}
    burning_in = sweep.evolve([1.0, 1.0], [False] * 2, values, True, settings(), random)
    assert burning_in == [(None, values[0])] * 2


def run_of(level_name, returns):
    """Returns a run in which each level's episodes end after 100, 200, ... frames."""
    episodes = {
        level: np.array([(100.0 * i, 0, 0, value) for i, value in enumerate(values, 1)])
        for level, values in returns.items()
    }
    return plot.Run('', {'level_name': level_name}, episodes, [])


def test_fitness_is_the_mean_of_the_last_episodes_of_the_current_weights():
    run = run_of('CartPole-v1', {'CartPole-v1': [1.0, 2.0, 4.0, 9.0]})
    assert sweep.fitness_of(run, 0, 100) == 4
    assert sweep.fitness_of(run, 0, 2) == 6.5
    assert sweep.fitness_of(run, 300, 100) == 9
    assert sweep.fitness_of(run, 400, 100) is None
    several = run_of('levels:a,levels:b', {'levels:a': [1.0] * 8, 'levels:b': [3.0]})
    assert sweep.fitness_of(several, 0, 100) == 2
    assert sweep.fitness_of(several, 100, 100) is None


def test_fitness_of_a_suite_is_capped_and_human_normalized():
    levels = suites.load('dmlab30').levels
    share = dict.fromkeys((level.name for level in levels), 0.5) | {levels[3].name: 3.0}
    returns = {
        level.name: [level.random + share[level.name] * (level.human - level.random)]
        for level in levels
    }
    found = sweep.fitness_of(run_of('dmlab30', returns), 0, 100)
    np.testing.assert_allclose(found, (29 * 50 + 100) / 30)
    del returns[levels[0].name]
    assert sweep.fitness_of(run_of('dmlab30', returns), 0, 100) is None


def test_lineage_goes_back_through_copies():
    copied = {(0, 'a'): 'b', (1, 'c'): 'a', (2, 'a'): 'c'}
    history = [
        {'round': number, 'member': name, 'copied_from': copied.get((number, name))}
        for number in range(3)
        for name in 'abc'
    ]
    state = sweep_state.State({}, 3, [], {}, history)
    assert state.lineage('c') == ['b', 'a', 'c']
    assert state.lineage('a') == ['b', 'a', 'a']
    assert state.lineage('b') == ['b', 'b', 'b']


def test_members_are_ranked_by_fitness_and_those_without_come_last():
    members = [
        sweep_state.Member(name, {'epsilon': 0.1}, fitness=fitness)
        for name, fitness in (('a', None), ('b', -1.0), ('c', 5.0))
    ]
    assert [member.name for member in sweep_report.ranked(members)] == ['c', 'b', 'a']
    lines = sweep_report.table(sweep_state.State({}, 0, members, {}, [])).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ['c', 'b', 'a']


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'method': 'grid'}, r"key method: 'grid' is not known; known are random, pbt"),
        ({'membres': 3}, r"key membres: 'membres' is not known; did you mean 'members'"),
        ({'members': 0}, r'key members: 0 should be a whole number from 1 on'),
        ({'parallel': '2'}, r'key parallel: "2" should be a whole number'),
        ({'flags': 3}, r'key flags: give an object'),
        ({'flags': {'level_name': 'a'}}, r'key flags\.total_environment_frames: it is missing'),
        ({'flags': FLAGS | {'batch_sise': 3}}, r"key flags: 'batch_sise' .* mean 'batch_size'"),
        ({'flags': FLAGS | {'flagfile': 'no'}}, r'key flags\.flagfile: there is no file no'),
        ({'flags': FLAGS | {'torso': 'big'}}, r'torso: flag --torso=big: value should be one of <'),
        ({'flags': FLAGS | {'logdir': 'a'}}, r'key flags\.logdir: a sweep sets this flag itself'),
        ({'flags': FLAGS | {'test_num_episodes': 3}}, r'flags\.test_num_episodes: a sweep sets'),
        ({'flags': FLAGS | {'epsilon': 1}}, r'key space\.epsilon: it stands among the flags'),
        ({'space': {}}, r'key space: name at least one'),
        ({'space': {'epsilon': {'normal': [0, 1]}}}, r"key space\.epsilon: 'normal' is not known"),
        ({'space': {'epsilon': {'uniform': [2, 1]}}}, r'uniform: give the lowest and the highest'),
        ({'space': {'epsilon': {'log_uniform': [0, 1]}}}, r'log_uniform: 0 has no logarithm'),
        ({'space': {'seed': {'uniform': [1, 9]}}}, r'seed: --seed=1\.0 is not a whole number\.$'),
        (PBT | {'space': {'torso': {'choice': ['deep']}}}, r'key space\.torso: population based'),
        (PBT | {'pbt': {}}, r'key pbt\.round_frames: it is missing'),
        (PBT | {'pbt': {'round_frames': 12000}}, r'key pbt\.round_frames: 12000 frames are all of'),
        (PBT | {'pbt': {'round_frames': 9, 'perturb_factor': 0.8}}, r'factor: 0\.8 should be'),
        (PBT | {'members': 1}, r'key members: 1 should be a whole number from 2 on'),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_give_one_sentence(tmp_path, capsys, change, message):
    path = write(tmp_path, RANDOM | change)
    assert sweep.main([path, f'--logdir={tmp_path}/sweep']) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'The sweep {path}') and error.count('\n') == 1
    assert re.search(message, error), error
    assert not (tmp_path / 'sweep').exists()


def test_missing_invalid_and_changed_sweeps_give_one_sentence(tmp_path, capsys):
    assert sweep.main([str(tmp_path / 'none.json')]) == 2
    assert 'Cannot read the sweep' in capsys.readouterr().err
    path = tmp_path / 'search.json'
    path.write_text('{"method": NaN}')
    assert sweep.main([str(path)]) == 2
    assert 'is not JSON' in capsys.readouterr().err
    config = sweep_config.read(write(tmp_path, RANDOM))
    sweep_state.load(str(tmp_path), config).save(str(tmp_path))
    path = write(tmp_path, RANDOM | {'members': 3, 'parallel': 2, 'seed': 4})
    assert sweep.main([path, f'--logdir={tmp_path}']) == 2
    assert 'was started with another value of members, seed: set it' in capsys.readouterr().err
    (tmp_path / 'sweep.json').write_text('[]')
    assert sweep.main([path, f'--logdir={tmp_path}']) == 2
    assert 'is not the state of a sweep' in capsys.readouterr().err


def row_of(**changes):
    return {
        'round': 0, 'member': '00', 'frames': 9, 'fitness': None, 'error': '',
        'values': {'epsilon': 0.1}, 'copied_from': None,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ('where', 'changes'),
    [
        ('state', {'round': -1}),
        ('state', {'round': '0'}),
        ('state', {'copies': []}),
        ('state', {'copies': {'00': 1}}),
        ('state', {'history': {}}),
        ('state', {'history': [3]}),
        ('state', {'history': [row_of(fitness='9')]}),
        ('state', {'history': [row_of(frames=None)]}),
        ('state', {'history': [row_of(copied_from=1)]}),
        ('state', {'history': [row_of(values=[])]}),
        ('state', {'history': [{'round': 0}]}),
        ('state', {'members': []}),
        ('state', {'members': {}}),
        ('state', {'members': [3]}),
        ('state', {'identity': None}),
        ('state', {'more': 1}),
        ('member', {'name': 3}),
        ('member', {'values': 'epsilon'}),
        ('member', {'values': {'epsilon': None}}),
        ('member', {'values': {'epsilon': float('nan')}}),
        ('member', {'trained': 'yes'}),
        ('member', {'frames': 0.5}),
        ('member', {'fitness': []}),
        ('member', {'fitness': float('inf')}),
        ('member', {'episodes': None}),
        ('member', {'error': None}),
        ('member', {'more': 1}),
    ],
)
def test_an_invalid_state_gives_one_sentence(tmp_path, where, changes):
    config = sweep_config.read(write(tmp_path, RANDOM))
    state = sweep_state.load(str(tmp_path), config)
    state.history.append(row_of(copied_from='01', fitness=2.5))
    state.save(str(tmp_path))
    assert sweep_state.load(str(tmp_path), config) == state
    path = tmp_path / 'sweep.json'
    content = json.loads(path.read_text())
    (content if where == 'state' else content['members'][0]).update(changes)
    path.write_text(json.dumps(content))
    with pytest.raises(LogdirError, match='sweep.json is not the state of a sweep: give another'):
        sweep_state.load(str(tmp_path), config)


def test_a_sweep_reports_the_progress_of_its_members(tmp_path, monkeypatch):
    class Member:
        """Trains a quarter of its frames between two polls, and then fails."""

        exit_codes = (None, None, None, 1)

        def __init__(self, member, logdir, flags):
            self.member, self.logdir, self.output_path = member, pathlib.Path(logdir), 'output'
            self.looks = 0
            self.logdir.mkdir(parents=True)

        @property
        def exit_code(self):
            code = self.exit_codes[min(self.looks, 3)]
            if self.looks:
                with open(self.logdir / 'metrics.jsonl', 'a') as file:
                    row = {'frames': 3000 * self.looks, 'agent_steps': 1, 'wall_seconds': 1}
                    print(json.dumps(row), file=file)
            self.looks += 1
            return code

        def said(self):
            return ''

    monkeypatch.setattr(sweep, '_Process', Member)
    monkeypatch.setattr(sweep, '_PROGRESS_SECONDS', 0.0)
    monkeypatch.setattr(sweep, '_POLL_SECONDS', 0.0)
    config = sweep_config.read(write(tmp_path, RANDOM | {'parallel': 2}))
    lines = []
    search = sweep.Sweep(config, str(tmp_path / 'sweep'), lines.append, lambda: 0)
    with pytest.raises(sweep.SweepError):
        search.run()
    assert [line for line in lines if ' is at ' in line] == [
        f'0 of 2 members done: 00 is at {percent}% of 12,000 frames, '
        f'01 is at {percent}% of 12,000 frames'
        for percent in (0, 25, 50)
    ]


class Sweep:
    """A sweep in its own process, here with members that have TensorFlow imported in advance.

    A context manager: leaving it kills the process and its members.
    """

    def __init__(self, folder, config):
        self._outputs = [folder / 'output.txt', folder / 'errors.txt']
        self._members = set()
        self.process = self._start([config, f'--logdir={folder}/sweep'])

    def _start(self, flags):
        environment = os.environ | {'PYTHONPATH': str(ROOT)}
        return WarmProcess(TESTS / 'warm_sweep.py', flags, environment, ROOT, self._outputs)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        for process_id in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def members(self):
        """Ids of the running members that this function has seen while the sweep ran."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._members |= {each.pid for each in psutil.Process(self.process.pid).children()}
        return [process_id for process_id in self._members if is_running(process_id)]

    def said(self):
        return ''.join(path.read_text() for path in self._outputs)

    def wait_until(self, happened):
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)


@pytest.fixture
def finished(tmp_path):
    """Four members of a random search: one failed, one is not finished; with their runs."""
    config = sweep_config.read(write(tmp_path, RANDOM | {'members': 4}))
    members = [
        sweep_state.Member(f'{i:02}', config.sample(i), i != 2, 4000, None if i == 3 else i, 9)
        for i in range(4)
    ]
    members[3].error = 'Loss or gradient was not finite'
    rows = np.array([[4.0 * i, i, i / 60, i] for i in range(20)])
    runs = {member.name: plot.Run('', {}, {'CartPole-v1': rows}, []) for member in members}
    return config, members, runs


def legend_of(figure):
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    return dict(zip(names, legend.legend_handles, strict=True))


def test_the_picture_of_a_search_says_what_its_lines_are(finished):
    config, members, runs = finished
    state = sweep_state.State(config.identity, 0, members, {}, [])
    figure = sweep_report.search_figure(state, config, runs)
    legend = legend_of(figure)
    assert [*legend] == ['the fittest', 'other members', 'failed', 'not finished']
    drawn = [
        sum(
            (line.get_color(), line.get_linestyle()) == (look.get_color(), look.get_linestyle())
            for line in figure.axes[0].get_lines()
        )
        for name, look in legend.items()
        if name != 'other members'
    ]
    # The fittest is not finished either: its line is blue and dashed.
    assert drawn == [0, 1, 0]
    labels = [axes.get_xlabel() for axes in figure.axes if axes.get_visible()]
    assert labels[2:] == ['entropy cost', 'learning rate', 'epsilon']

    members[2].trained = True
    del members[3]
    figure = sweep_report.search_figure(state, config, runs)
    assert [*legend_of(figure)] == ['the fittest', 'other members']
    colors = [line.get_color() for line in figure.axes[0].get_lines()]
    assert colors.count(legend_of(figure)['the fittest'].get_color()) == 1


def test_the_picture_of_a_population_says_what_its_lines_are(finished):
    config, members, _ = finished
    history = [
        {'round': number, 'member': member.name, 'frames': 2000 * (number + 1), 'error': '',
         'fitness': index + number, 'values': member.values,
         'copied_from': '03' if (number, index) == (0, 0) else None}
        for number in range(2) for index, member in enumerate(members)
    ]  # fmt: skip
    figure = sweep_report.pbt_figure(sweep_state.State(config.identity, 1, members, {}, history))
    legend = legend_of(figure)
    assert [*legend] == ['the fittest and its ancestors', 'other members', 'copied from another']
    fitness = figure.axes[0].get_lines()
    for name, number in (('the fittest and its ancestors', 1), ('copied from another', 1)):
        look = legend[name]
        found = [
            line for line in fitness
            if (line.get_color(), line._unscaled_dash_pattern)
            == (look.get_color(), look._unscaled_dash_pattern)
        ]  # fmt: skip
        assert len(found) == number
    assert figure.axes[1].get_ylabel() == 'entropy cost'


class ColdSweep(Sweep):
    """A sweep from its command line, which starts members as users get them."""

    def _start(self, flags):
        with contextlib.ExitStack() as stack:
            stdout, stderr = (stack.enter_context(open(path, 'wb')) for path in self._outputs)
            return subprocess.Popen(
                [sys.executable, '-m', 'impala.tools.sweep', *flags],
                stdout=stdout,
                stderr=stderr,
                cwd=ROOT,
            )


def lines_of(member):
    path = member / 'metrics.jsonl'
    return path.read_text().splitlines() if path.exists() else []


def test_a_stopped_or_killed_sweep_resumes_where_it_was(tmp_path):
    config = write(tmp_path, RANDOM | {'flags': FLAGS | {'total_environment_frames': 16000}})
    first, second = (tmp_path / 'sweep' / 'members' / name for name in ('00', '01'))
    with Sweep(tmp_path, config) as run:
        run.wait_until(lambda: lines_of(first))
        assert len(run.members()) == 1
        os.kill(run.process.pid, signal.SIGINT)
        assert run.process.wait(PATIENCE_SECONDS) == 0
        assert not run.members()
    assert '0 of 2 members are complete' in run.said()
    assert 'The same command resumes from there.' in run.said()
    assert (first / 'checkpoints' / 'ckpt-1.index').exists()
    assert not second.exists()

    with Sweep(tmp_path, config) as run:
        run.wait_until(lambda: lines_of(second))
        assert len(run.members()) == 1
        run.process.kill()
        run.process.wait()
        # Its members notice and end.
        run.wait_until(lambda: not run.members())
    before = lines_of(first)
    assert json.loads(before[-1])['frames'] >= 16000
    assert json.loads(lines_of(second)[-1])['frames'] < 16000

    with Sweep(tmp_path, config) as run:
        assert run.process.wait(PATIENCE_SECONDS) == 0
    assert lines_of(first) == before
    for member in (first, second):
        said = (member / 'output.txt').read_text()
        assert said.count('Resuming from') == 1 and said.count('all goes to') == 2
        assert json.loads(lines_of(member)[-1])['frames'] >= 16000
    with open(tmp_path / 'sweep' / 'results.csv', newline='') as file:
        rows = {row['member']: row for row in csv.DictReader(file)}
    for index, (name, row) in enumerate(sorted(rows.items())):
        assert row['outcome'] == 'done'
        member = tmp_path / 'sweep' / 'members' / name
        flags = (member / 'flags.txt').read_text()
        for flag in SPACE:
            assert f'--{flag}={row[flag]}\n' in flags
        assert f'--seed={1 + index}\n' in flags and 'logdir' not in flags
        with open(member / 'episodes.csv', newline='') as file:
            returns = [float(episode['episode_return']) for episode in csv.DictReader(file)]
        assert float(row['fitness']) == pytest.approx(np.mean(returns[-100:]))
        assert int(row['episodes']) == len(returns)
    assert np.ptp(cv2.imread(str(tmp_path / 'sweep' / 'sweep.png'))) > 200

    # There is nothing left to do.
    with Sweep(tmp_path, config) as run:
        assert run.process.wait(PATIENCE_SECONDS) == 0
    assert lines_of(first) == before


def test_a_population_copies_the_checkpoint_of_a_better_member(tmp_path):
    # One of these samples makes every loss infinite with the first update.
    space = {'learning_rate': {'choice': [1e-3, 1e6]}, 'epsilon': {'choice': [1e-3]}}
    content = RANDOM | {
        'method': 'pbt',
        'members': 3,
        'parallel': 3,
        'flags': FLAGS | {'total_environment_frames': 4000},
        'space': space,
        'pbt': {'round_frames': 2000},
        'seed': 23,
    }
    config = sweep_config.read(write(tmp_path, content))
    samples = [config.sample(index)['learning_rate'] for index in range(3)]
    assert samples == [1e-3, 1e-3, 1e6]
    with Sweep(tmp_path, write(tmp_path, content)) as run:
        assert run.process.wait(PATIENCE_SECONDS) == 0, run.said()

    with open(tmp_path / 'sweep' / 'history.csv', newline='') as file:
        history = {(row['round'], row['member']): row for row in csv.DictReader(file)}
    assert len(history) == 6
    fitness = [float(history['0', name]['fitness']) for name in ('00', '01')]
    assert 'Loss or gradient was not finite' in history['0', '02']['error']
    assert history['0', '02']['copied_from'] in ('00', '01')
    better, worse = ('00', '01') if fitness[0] > fitness[1] else ('01', '00')
    assert history['0', better]['copied_from'] == ''
    # The failed member cannot be drawn.
    assert history['0', worse]['copied_from'] == better
    folder = tmp_path / 'sweep' / 'members'
    for name in ('02', worse):
        source = folder / history['0', name]['copied_from'] / 'checkpoints' / 'ckpt-1'
        target = folder / name / 'checkpoints' / 'ckpt-2'
        for ending in ('.index', '.data-00000-of-00001'):
            data = pathlib.Path(f'{target}{ending}').read_bytes()
            assert data == pathlib.Path(f'{source}{ending}').read_bytes()
        assert (
            f'Resuming from {target}, at agent step 2,000'
            in (folder / name / 'output.txt').read_text()
        )
    for name in ('00', '01', '02'):
        row = history['1', name]
        assert row['error'] == '' and int(row['frames']) >= 4000
        # The learning rate falls over both rounds; in the second it is the new one.
        line = json.loads(lines_of(folder / name)[-1])
        done = (line['frames'] - 80) / 4000
        assert line['learning_rate'] == pytest.approx(float(row['learning_rate']) * (1 - done))
        for value in (float(row['learning_rate']) / 1e-3, float(row['epsilon']) / 1e-3):
            assert any(value == pytest.approx(factor) for factor in (1, 1.2, 1 / 1.2))
        flags = (folder / name / 'flags.txt').read_text()
        assert f'--learning_rate={row["learning_rate"]}\n' in flags and 'stop_at' not in flags
    assert np.ptp(cv2.imread(str(tmp_path / 'sweep' / 'sweep.png'))) > 200


def test_incompatible_values_cost_only_one_member(tmp_path):
    space = {'batch_size': {'choice': [2, 8]}}
    flags = {k: v for k, v in FLAGS.items() if k != 'batch_size'} | {'replay_fraction': 0.6}
    flags |= {'replay_capacity': 50, 'total_environment_frames': 4000}
    content = RANDOM | {'space': space, 'seed': 1, 'flags': flags}
    config = sweep_config.read(write(tmp_path, content))
    assert [config.sample(index)['batch_size'] for index in range(2)] == [2, 8]
    with ColdSweep(tmp_path, write(tmp_path, content)) as run:
        assert run.process.wait(PATIENCE_SECONDS) == 0, run.said()
    with open(tmp_path / 'sweep' / 'results.csv', newline='') as file:
        rows = {row['member']: row for row in csv.DictReader(file)}
    assert 'was refused: --replay_fraction=0.6' in rows['00']['outcome']
    assert rows['01']['outcome'] == 'done' and int(rows['01']['frames']) >= 4000


def test_a_mistake_common_to_all_members_ends_the_sweep(tmp_path):
    content = RANDOM | {'flags': FLAGS | {'level_name': 'CartPol-v1'}}
    with Sweep(tmp_path, write(tmp_path, content)) as run:
        assert run.process.wait(PATIENCE_SECONDS) == 2
    assert 'was refused: ' in run.said().splitlines()[-1] and 'CartPol-v1' in run.said()
    assert 'Traceback' not in run.said()
