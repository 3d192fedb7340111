"""Runs the command on inputs from a grammar, and accepts only two answers.

    python tests/fuzz                                    # until Ctrl-C, with a new seed
    python tests/fuzz --seed=7 --first=41 --cases=1      # one case again

The command either refuses an input with one sentence and exit code 2, or trains or tests to the
end. Everything else is a failure, which is printed with the command that repeats it.
"""

import collections
import concurrent.futures
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator

from absl import flags as absl_flags
from command_line import WarmRun

from fuzz import grammar
from impala import exit_codes
from impala.config import all_settings
from impala.runs import flags

CASE_SECONDS = 120
REFUSED, ENDED_WELL = 'refused', 'ended well'

# multiprocessing polls all its processes when it starts one, which must not happen concurrently.
_one_at_a_time = threading.Lock()

# Reports of progress, which are no answer to the input.
_PROGRESS = re.compile(
    r'Starting|Tracing|WARNING: |Resuming from|Moved \d+ rows|.* frames \(|.*; all goes to |'
    r'Replay of |Testing |Changed flags: |Learning rate and|Actor .* restarted|\s*$'
)


def flag_types() -> dict[str, str]:
    """Returns name -> type of each flag of the command."""
    values = absl_flags.FlagValues()
    flags.define(values)
    return {name: values[name].flag_type() for name in all_settings()}


def finished_run(folder: pathlib.Path) -> pathlib.Path:
    """Trains a run to its end; returns its logdir."""
    logdir = folder / 'run'
    case = grammar.Case('template', (*_template_flags(), f'--logdir={logdir}'))
    answer, fault = run_case(case, folder, None)
    assert answer == ENDED_WELL, fault
    return logdir


def _template_flags() -> Iterable[str]:
    return ('--level_name=CartPole-v1', '--num_actors=2', '--envs_per_process=2',
            '--unroll_length=10', '--total_environment_frames=200', '--log_secs=0')  # fmt: skip


def run_case(
    case: grammar.Case, folder: pathlib.Path, template: pathlib.Path | None
) -> tuple[str, str]:
    """Runs the command on a case.

    Args:
      case: of the grammar.
      folder: of the case; made if missing.
      template: logdir of a finished run, copied if the case needs one.

    Returns:
      REFUSED or ENDED_WELL, and ''; after a failure '', and what is wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    if case.is_finished:
        assert template is not None
        shutil.copytree(template, folder / 'run')
    if case.damage is not None:
        _damage(folder / 'run', case.damage)
    arguments = [flag.replace('{folder}', str(folder)) for flag in case.flags]
    with _one_at_a_time:
        run = WarmRun(folder / 'process', *arguments, pythonpath=[folder])
    started = time.monotonic()
    try:
        code = None
        while code is None:
            if time.monotonic() - started > CASE_SECONDS:
                return '', f'not ended after {CASE_SECONDS} seconds:\n{run.stdout}{run.stderr}'
            time.sleep(0.02)
            with _one_at_a_time:
                code = run.process.poll()
        try:
            run.assert_nothing_left()
        except AssertionError:
            return '', 'processes or folders are left'
        stdout, stderr = run.stdout, run.stderr
    finally:
        with _one_at_a_time:
            run.__exit__()
    seconds = time.monotonic() - started
    fault = _fault(code, stdout, stderr)
    if fault:
        return '', f'{fault} (exit code {code}, {seconds:.1f} s)\n{stdout}{stderr}'
    return (REFUSED if code else ENDED_WELL), ''


def _fault(code: int, stdout: str, stderr: str) -> str:
    """Returns what is wrong with an answer, or ''."""
    for text in ('Traceback', 'Exception ignored', 'Check failed', '*** SIG'):
        if text in stderr + stdout:
            return f'{text!r} was printed'
    if code == 0:
        return '' if stdout.strip() else 'it ended without a word'
    if code != exit_codes.BAD_INPUT:
        return 'neither refused nor ended well'
    lines = [line for line in stderr.splitlines() if not _PROGRESS.match(line)]
    if lines and 'lists the flags' in lines[-1]:
        lines.pop()
    if len(lines) != 1:
        return f'{len(lines)} lines where one sentence belongs'
    if len(lines[0].split()) < 3:
        return 'too few words for a sentence'
    return ''


def _damage(run: pathlib.Path, damage: grammar.Damage) -> None:
    path = run / damage.file
    content = path.read_bytes()
    if damage.how in (grammar.MISSING, grammar.FOLDER):
        path.unlink()
        if damage.how == grammar.FOLDER:
            path.mkdir()
        return
    text = damage.text.encode(errors='surrogateescape')
    at = int(damage.where * len(content))
    change = grammar.DAMAGES[damage.how]
    path.write_bytes(change(content, at, text.replace(b'\\', b'')))


def fuzz(
    seed: int, numbers: Iterable[int], folder: pathlib.Path, template: pathlib.Path
) -> Iterator[tuple[int, str, str]]:
    """Runs cases, two at a time.

    Args:
      seed: of the grammar.
      numbers: of the cases.
      folder: for all files; a case's own files are removed when it ends.
      template: logdir of a finished run.

    Yields:
      Number of a case, and what `run_case` returned.
    """
    types = flag_types()

    def run(number: int) -> tuple[int, str, str]:
        own = folder / str(number)
        case = grammar.make_case(seed, number, types)
        answer, fault = run_case(case, own, template)
        shutil.rmtree(own, ignore_errors=True)
        return number, answer, fault and f'{case}\n{fault}'

    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        # Not `map`, which would first exhaust the numbers, and they may be endless.
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        for number in numbers:
            pending.append(executor.submit(run, number))
            if len(pending) > 4:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def repeat_command(seed: int, number: int) -> str:
    """Returns the command that repeats one case."""
    return f'python tests/fuzz --seed={seed} --first={number} --cases=1'
