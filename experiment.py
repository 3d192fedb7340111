"""IMPALA from the command line: trains on one machine or several, or tests what was trained.

    python experiment.py --level_name=ALE/Pong-v5 --num_actors=32 --logdir=/tmp/pong
    python experiment.py --mode=test --logdir=/tmp/pong

The flags are the settings of `impala/config.py`; docs/flags.md lists them.

Exit codes: 0 done, or stopped by a signal with everything saved; 1 failure; 2 bad input (one
sentence says what is wrong); 3 an actor job lost its learner; 4 done and saved, but most unrolls
were lost because actors kept dying; 130 interrupted at the start or during a test.
"""

import atexit
import contextlib
import gc
import os
import signal
import sys
import time
from typing import Any

from absl import app, logging
from absl import flags as absl_flags

from impala import exit_codes
from impala.config import Config, ConfigError, all_settings
from impala.runs import files, flag_file, flags
from impala.runs.output import outlive_readers
from impala.runs.stop_signal import INTERRUPTED
from impala.runs.tensorflow_start import starting_tensorflow

FLAGS = absl_flags.FLAGS
flags.define()


def main(unused_argv: list[str]) -> int:
    """Trains, tests or runs a job as the flags say; returns the exit code."""
    # TensorFlow takes seconds to load: check the flags first.
    try:
        config = _config()
    except (ConfigError, files.LogdirError) as error:
        return _fail(str(error), exit_codes.BAD_INPUT)
    if config.cluster.job_name == 'replay':
        return _serve_replay(config)
    if config.cluster.job_name == 'actor':
        return _act(config)
    _start_tensorflow(config)
    from impala.acting.actor_pool import UnrollsLostError
    from impala.acting.actor_processes import ActorError
    from impala.cluster.channel import ServerError
    from impala.cluster.learner_group import LearnerGroupError
    from impala.environments import LevelError
    from impala.training import TrainingError

    if config.run.debug:
        # The debugger may stop in a module that is being imported, and handles SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if config.run.mode == 'test':
            return _test(config)
        return _train(config)
    except (ConfigError, LevelError, ServerError, files.LogdirError) as error:
        return _fail(str(error), exit_codes.BAD_INPUT)
    except (ActorError, LearnerGroupError, TrainingError) as error:
        return _fail(str(error), exit_codes.FAILURE)
    except UnrollsLostError as error:
        if error.checkpoint is not None:
            _print_end(config, error.checkpoint)
        return _fail(str(error), exit_codes.UNROLLS_LOST)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, exit_codes.INTERRUPTED)


def _config() -> Config:
    """Returns the flags as a config; in test mode, with the flags of the run in --logdir.

    Raises:
      ConfigError, LogdirError: one sentence for the user.
    """
    for name, known in all_settings().items():
        if known.setting.is_path:
            # A shell expands ~ only at the start of a word.
            FLAGS[name].value = os.path.expanduser(str(FLAGS[name].value))
    level = FLAGS['level_name']
    if str(level.value).endswith('.csv'):
        # The run may be resumed and tested from another folder.
        level.value = os.path.abspath(os.path.expanduser(str(level.value)))  # type: ignore
    config = flags.config_of()
    flags.refuse_unused(config, sys.argv[1:])
    if config.run.mode == 'train':
        # A file that cannot be used is refused before anything takes time or is written.
        config.cluster.secret()
        return config
    path = config.test.checkpoint.removesuffix('.index')
    if path and not FLAGS['logdir'].present:
        FLAGS['logdir'].value = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    if config.test.watch and not path:
        _await_run(FLAGS.logdir)
    _restore_flags()
    return flags.config_of()


def _await_run(logdir: str) -> None:
    """Waits until a training run has started in a folder."""
    path = os.path.join(logdir, files.FLAG_FILE)
    if not os.path.exists(path):
        print(f'Waiting for a training run in {logdir}', flush=True)
        while not os.path.exists(path):
            time.sleep(1)


def _restore_flags() -> None:
    """Sets the flags of the run in --logdir, except those given on the command line.

    Raises:
      LogdirError: there is no run, or its flag file is invalid.
    """
    path = os.path.join(FLAGS.logdir, files.FLAG_FILE)
    if not os.path.isfile(path):
        raise files.LogdirError(
            f'{FLAGS.logdir} is not the folder of a training run ({path} is missing): '
            'give its --logdir.'
        )
    given = flags.given()
    try:
        stored = flag_file.read(path)
        flags.parse(
            sys.argv[0],
            [line for line in stored if not given & {line.name, line.name.removeprefix('no')}],
        )
    except flag_file.FlagFileError as error:
        raise files.LogdirError(f'Cannot restore the flags of the run: {error}') from error


def _start_tensorflow(config: Config) -> None:
    logging.set_verbosity(logging.ERROR)
    with starting_tensorflow():
        import tensorflow as tf

        if config.learner.intra_op_threads:
            tf.config.threading.set_intra_op_parallelism_threads(config.learner.intra_op_threads)
        if config.run.mode == 'test':
            # A test only acts: idle threads that look for work would slow the environments.
            tf.config.threading.set_inter_op_parallelism_threads(1)
        if config.cluster.job_name == 'actor' and config.cluster.actor_device == 'cpu':
            tf.config.set_visible_devices([], 'GPU')
        chooses_devices = bool(config.learner.learner_devices)
        if not (config.is_learner and (chooses_devices or config.cluster.has_several_learners)):
            tf.config.list_logical_devices()


def _train(config: Config) -> int:
    from impala import training

    path = training.train(config)
    if config.cluster.has_several_learners and config.cluster.task > 0:
        print('The first learner has the checkpoint.')
        return 0
    if path is None:
        return _fail(
            'Stopped before the first update: there is no checkpoint yet.', exit_codes.INTERRUPTED
        )
    _print_end(config, path)
    return 0


def _print_end(config: Config, path: str) -> None:
    """Prints a summary of a run; `path` is its last checkpoint."""
    from impala.runs import run_summary

    run = config.run
    summary = run_summary.read_summary(run.logdir)
    print(run_summary.describe_summary(summary))
    print(f'Checkpoint: {path}')
    if 0 < run.stop_at_frames <= summary['frames'] < run.total_environment_frames:
        print(f'Stopped at --stop_at_frames={run.stop_at_frames}; without it the run continues.')
    elif summary['frames'] < run.total_environment_frames:
        print('The same command resumes from there.')
    else:
        print('The run is complete; a larger --total_environment_frames continues it.')


def _act(config: Config) -> int:
    from impala.acting.actor_pool import UnrollsLostError
    from impala.acting.actor_processes import ActorError
    from impala.cluster import job_start
    from impala.environments import LevelError

    try:
        with job_start.started(
            config, flags.given(), lambda text: print(text, file=sys.stderr)
        ) as start:
            if start.config.actors.inference == 'learner':
                from impala.cluster import environment_job

                sentence = environment_job.run(start)
            else:
                _start_tensorflow(config)
                from impala.cluster import actor_job

                sentence = actor_job.run(start)
    except (ConfigError, LevelError) as error:
        return _fail(str(error), exit_codes.BAD_INPUT)
    except (ActorError, job_start.ActorJobError) as error:
        return _fail(str(error), exit_codes.FAILURE)
    except job_start.LearnerLost as error:
        return _fail(str(error), exit_codes.LEARNER_LOST)
    except UnrollsLostError as error:
        return _fail(str(error), exit_codes.UNROLLS_LOST)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, exit_codes.INTERRUPTED)
    print(sentence)
    return 0


def _test(config: Config) -> int:
    from impala import evaluation

    try:
        returns = evaluation.evaluate(config, lambda text: print(text, flush=True))
    except evaluation.EvaluationInterrupted as error:
        return _fail(str(error), exit_codes.INTERRUPTED)
    if returns is None:
        return _fail('Interrupted; nothing was written.', exit_codes.INTERRUPTED)
    print(f'Written to {os.path.join(config.run.logdir, evaluation.SCORES_FILE)}')
    return 0


def _serve_replay(config: Config) -> int:
    """Serves a part of the experience replay, without environments, network and TensorFlow."""
    from impala.cluster import channel, replay_job

    try:
        print(replay_job.run(config, lambda text: print(text, file=sys.stderr)))
        return 0
    except (ConfigError, channel.ServerError) as error:
        return _fail(str(error), exit_codes.BAD_INPUT)
    except replay_job.ReplayJobError as error:
        return _fail(str(error), exit_codes.FAILURE)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, exit_codes.INTERRUPTED)


def _interruptible_start() -> None:
    """Makes SIGINT and SIGTERM end the process with a sentence while it has nothing to lose.

    Python would raise an exception at any place in the modules being imported, and some of them
    turn it into another one.
    """
    # `starting_tensorflow` redirects descriptor 2 for a while; keep the terminal's.
    terminal = os.dup(sys.stderr.fileno())

    def end(number: int, frame: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(terminal, f'{INTERRUPTED}\n'.encode())
        os._exit(128 + number)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _parse_flags(argv: list[str]) -> list[str]:
    if {'--helpshort', '-helpshort', '--help', '-help'} & {*argv[1:]}:
        print(f'{__doc__}\n{flags.short_help()}')
        sys.exit(0)
    try:
        rest = flags.parse(argv[0], flag_file.expand(argv[1:]))
    except flag_file.FlagFileError as error:
        sys.exit(_fail(f'{error}\n`{argv[0]} --helpshort` lists the flags.', exit_codes.BAD_INPUT))
    if len(rest) > 1:
        sys.exit(_fail(f'{rest[1]!r} is not a flag: flags start with --.', exit_codes.BAD_INPUT))
    return rest


if __name__ == '__main__':
    outlive_readers()
    _interruptible_start()
    # Otherwise Python's last garbage collection visits all of TensorFlow's objects, which takes
    # more than a second. Everything that must end cleanly has ended by then.
    atexit.register(gc.freeze)
    app.run(main, flags_parser=_parse_flags)
