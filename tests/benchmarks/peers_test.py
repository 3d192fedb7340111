"""Tests of benchmarks/peers.py, with scripts that print what the peers do."""

import json
import pathlib
import re
import shlex
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks import peers

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Has a process in its own session and one in another, and writes down their ids.
FAKE_PEER = """#!{python}
import pathlib, signal, subprocess, sys, time
arguments = sys.argv[1:]
if arguments[0] == '-c':
    sys.exit()
child = [sys.executable, '-c', 'import signal, time; signal.signal(2, lambda *_: None);'
         'time.sleep(1000)']
children = [subprocess.Popen(child), subprocess.Popen(child, start_new_session=True)]
with open({pids!r}, 'a') as file:
    print(*(each.pid for each in children), file=file)
{before}
started, number = time.monotonic(), 0
while True:
    number += 1
    time.sleep(max(0, started + 0.1 * number - time.monotonic()))
    {tell}
"""
SAY_CLEANRL = "print('SPS:', 7)"
SAY_SAMPLE_FACTORY = (
    "print('[2026] Fps is (10 sec: nan). Total num frames: %d. Throughput' % (200 * (number - 1)),"
    ' file=sys.stderr)'
)


def is_alive(pid):
    # Whether anything takes note of the end of an orphan depends on the machine's first process.
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def fake(tmp_path):
    """Makes fake peers; afterwards, none of their processes must live."""
    pids = tmp_path / 'pids'

    def make(tell, before=''):
        path = tmp_path / f'python{len(list(tmp_path.iterdir()))}'
        path.write_text(
            FAKE_PEER.format(python=sys.executable, pids=str(pids), tell=tell, before=before)
        )
        path.chmod(0o755)
        return str(path)

    yield make
    if pids.exists():
        started = [int(pid) for pid in pids.read_text().split()]
        assert started and not any(is_alive(pid) for pid in started)


def test_sample_factorys_frames_are_counted(fake):
    program = peers.sample_factory(fake(SAY_SAMPLE_FACTORY))
    measured = peers.measure(program, warm_up=0.3, seconds=1, patience=30)
    assert measured.rate == pytest.approx(2000, rel=0.2)
    # Three processes of Python that have imported next to nothing.
    assert 0.003 < measured.gigabytes < 0.2


def test_cleanrls_batches_are_counted(fake):
    program = peers.cleanrl(fake(SAY_CLEANRL), num_envs=4, epochs=1)
    measured = peers.measure(program, warm_up=0.3, seconds=1, patience=30)
    assert measured.rate == pytest.approx(10 * 4 * 128, rel=0.2)


def test_the_warm_up_does_not_count(fake):
    # Twenty batches at once, then one every 0.1 seconds.
    path = fake(SAY_CLEANRL, before="print(*20 * ['SPS: 1'], sep='\\n')")
    program = peers.cleanrl(path, num_envs=1, epochs=1)
    measured = peers.measure(program, warm_up=0.3, seconds=1, patience=30)
    assert measured.rate == pytest.approx(10 * 128, rel=0.2)


@pytest.mark.parametrize('ignores_interrupts', [False, True])
def test_a_peer_that_hangs_is_ended_with_all_its_processes(fake, monkeypatch, ignores_interrupts):
    monkeypatch.setattr(peers, '_END_SECONDS', 0.5)
    ignore = 'signal.signal(signal.SIGINT, signal.SIG_IGN)\n' if ignores_interrupts else ''
    path = fake(SAY_CLEANRL, before=f"{ignore}print('SPS: 1\\nstuck')\ntime.sleep(1000)")
    with pytest.raises(peers.Failure, match='has counted no step for 6 seconds:\nSPS: 1\nstuck'):
        peers.measure(peers.cleanrl(path, 32, 4), warm_up=0.1, seconds=1, patience=6)


def test_a_peer_that_fails_is_reported_and_its_session_is_ended(fake):
    # The process in another session is out of reach once its parent has ended.
    path = fake(SAY_CLEANRL, before="children.pop().kill()\nsys.exit('no such game')")
    with pytest.raises(peers.Failure, match=r'has ended with exit code 1:\nno such game'):
        peers.measure(peers.sample_factory(path), warm_up=0.1, seconds=1, patience=30)


def test_the_table_has_medians_and_ratios_of_each_round(capsys):
    own = [peers.own_program('shallow'), peers.own_program('nature')]
    programs = [*own, peers.sample_factory('python'), peers.cleanrl('python', 8, 4)]
    rates = [(3000, 1000, 1500, 400), (2000, 900, 500, 300), (4000, 1100, 1600, 1000)]
    names = [program.name for program in programs]
    rounds = [
        {
            name: peers.Measurement(rate, gigabytes)
            for name, rate in zip(names, rates_of_round, strict=True)
        }
        for rates_of_round, gigabytes in zip(rates, (1, 2, 4), strict=True)
    ]
    peers.report(programs, own, rounds)
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines[2:-1]]
    assert rows == [
        ['this project, shallow', 'shallow', '3,000', '3,000, 2,000, 4,000', '2.0', '', ''],
        ['this project, nature', 'nature', '1,000', '1,000, 900, 1,100', '2.0', '', ''],
        ['Sample Factory', 'shallow', '1,500', '1,500, 500, 1,600', '2.0']
        + ['2.50', '2.00, 4.00, 2.50'],
        ['CleanRL, 8 environments, 4 epochs', 'nature', '400', '400, 300, 1,000', '2.0']
        + ['2.50', '2.50, 3.00, 1.10'],
    ]
    result = json.loads(lines[-1])
    assert result['Sample Factory'] == {
        'agent_steps_per_second': 1500,
        'gigabytes': 2,
        'ratio': 2.5,
    }


def test_a_missing_peer_is_one_sentence(tmp_path, monkeypatch, capsys):
    for flags, text in [
        (
            [f'--cleanrl={tmp_path}/python'],
            r'--cleanrl=\S*/python cannot be started \(No such file or directory\): make it',
        ),
        (
            [f'--sample_factory={sys.executable}'],
            r'--sample_factory=\S+ lacks sample_factory sf_examples envpool: make it',
        ),
        ([], 'Nothing to compare with: give --sample_factory, --cleanrl or both.'),
    ]:
        monkeypatch.setattr(sys, 'argv', ['peers', *flags])
        with pytest.raises(SystemExit) as ended:
            peers.main()
        output = capsys.readouterr()
        assert ended.value.code == 2 and not output.out
        assert re.match(text, output.err) and len(output.err.splitlines()) == 1


def test_sigterm_ends_the_program_under_way(fake, tmp_path):
    # Only this project's own training precedes a peer; a fake one stands in for it.
    path = fake(SAY_CLEANRL)
    code = (
        'import sys; from benchmarks import peers; '
        f'peers.own_program = lambda _: peers.cleanrl({path!r}, 1, 1); peers.main()'
    )
    command = [sys.executable, '-c', code, f'--cleanrl={path}', '--seconds=1000']
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / 'pids').exists():
            assert time.monotonic() < deadline and process.poll() is None, shlex.join(command)
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 143
    finally:
        process.kill()
        process.communicate()


def test_a_python_that_has_the_modules_is_taken():
    peers.require(sys.executable, 'cleanrl', ['json', 'csv'])
