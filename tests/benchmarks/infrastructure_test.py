import json
import os
import pathlib

import psutil
import pytest
from warm_process import WarmProcess

from benchmarks import infrastructure

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def probe(tmp_path_factory):
    return infrastructure.build_probe(str(tmp_path_factory.mktemp('probe')))


def test_the_machinery_is_compared_with_the_bare_hand_over(tmp_path):
    flags = ['--num_actors=4', '--seconds=1', '--batch_size=2', '--unroll_length=10']
    outputs = tmp_path / 'stdout', tmp_path / 'stderr'
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    program = ROOT / 'benchmarks' / 'infrastructure.py'
    process = WarmProcess(program, flags, environment, ROOT, outputs)
    try:
        assert process.wait(120) == 0, outputs[1].read_text()
    finally:
        process.kill()
    values = json.loads(outputs[0].read_text().splitlines()[-1])
    assert values['agent_steps_per_second'] > 0
    # It does less work; on a busy machine it may have had less time, but not tens of times less.
    assert 0 < values['share'] < 10
    assert values['share'] == pytest.approx(
        values['agent_steps_per_second'] / values['bare'], abs=0.01
    )


def test_the_bare_hand_over_leaves_no_process(probe):
    rate = infrastructure.bare_rate(probe, num_actors=3, inference_batch_size=2, seconds=0.3)
    assert rate > 0
    commands = [process.info['cmdline'] or [] for process in psutil.process_iter(['cmdline'])]
    assert all(probe not in command for command in commands)
