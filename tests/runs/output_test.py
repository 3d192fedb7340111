import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Prints a lot, and ends with a code that Python itself does not use.
TALKATIVE = """
import sys
from impala.runs.output import outlive_readers
outlive_readers()
sys.stdin.read()
for number in range(20_000):
    print('a line of output', number)
print('the end')
print('a warning', file=sys.stderr)
with open('work', 'w') as file:
    file.write('done')
print('more', flush=True)
sys.exit(17)
"""


def run(folder, **settings):
    """Starts the program, which waits for the end of its input."""
    return subprocess.Popen(
        [sys.executable, '-c', TALKATIVE],
        cwd=folder,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        stdin=subprocess.PIPE,
        **settings,
    )


@pytest.mark.parametrize('is_blocking', [True, False])
def test_output_reaches_its_readers(tmp_path, is_blocking):
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, is_blocking)
    process = run(tmp_path, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    process.stdin.close()
    with open(read_end) as pipe:
        stdout = pipe.read()
    stderr = process.stderr.read()
    process.wait()
    lines = [f'a line of output {number}' for number in range(20_000)]
    assert stdout.splitlines() == [*lines, 'the end', 'more']
    assert stderr == 'a warning\n'
    assert process.returncode == 17


@pytest.mark.parametrize('lost', [('stdout',), ('stderr',), ('stdout', 'stderr')])
def test_losing_readers_changes_neither_work_nor_exit_code(tmp_path, lost):
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    process = run(tmp_path, **pipes)
    for name in lost:
        getattr(process, name).close()
        setattr(process, name, None)
    stdout, stderr = process.communicate()
    assert process.returncode == 17
    assert (tmp_path / 'work').read_text() == 'done'
    assert stderr in (None, b'a warning\n')
    assert stdout is None or stdout.endswith(b'more\n')


def test_a_full_disk_and_a_closed_terminal(tmp_path):
    with open('/dev/full', 'w') as full:
        process = run(tmp_path, stdout=full, stderr=full)
        process.communicate()
    assert process.returncode == 17
    main_end, terminal = os.openpty()
    process = run(tmp_path, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.close(main_end)
    process.communicate()
    assert process.returncode == 17


def test_output_closed_from_the_start_is_not_printed_into_files(tmp_path):
    shell = ['/bin/sh', '-c', 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable]
    talkative = TALKATIVE.replace('sys.stdin.read()', '')
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    ended = subprocess.run([*shell, talkative], cwd=tmp_path, env=environment)
    assert ended.returncode == 17
    assert (tmp_path / 'work').read_text() == 'done'
