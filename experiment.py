"""IMPALA from the command line: trains on one machine or several, or tests what was trained.

    python experiment.py --level_name=ALE/Pong-v5 --num_actors=32 --logdir=/tmp/pong
    python experiment.py --mode=test --logdir=/tmp/pong

Exit codes: 0 done or stopped by a signal with everything saved, 1 a failure, 2 bad input (one
sentence says what), 3 an actor job that has lost its learner, 4 done and saved though most unrolls
were lost since actors kept dying, 130 interrupted at the start or in a test.
"""

import atexit
import contextlib
import dataclasses
import gc
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from impala.runs import flag_file
from impala.runs.output import outlive_readers
from impala.runs.stop_signal import INTERRUPTED, INTERRUPTED_EXIT_CODE
from impala.runs.tensorflow_start import starting_tensorflow

FLAGS = flags.FLAGS

flags.DEFINE_string('logdir', '/tmp/agent', 'Folder of the run: checkpoints, metrics, curve.')
flags.DEFINE_enum('mode', 'train', ['train', 'test'], 'Train, or test the newest checkpoint.')
flags.DEFINE_integer(
    'test_num_episodes', 10, 'Episodes per level in test mode.', lower_bound=1, upper_bound=100_000
)
flags.DEFINE_integer(
    'test_max_frames',
    None,
    'Test: frames after which an episode is cut off. Default: 108,000 for Atari, 1,000,000 for '
    'others.',
    lower_bound=1,
    upper_bound=1_000_000_000,
)
flags.DEFINE_enum(
    'test_policy',
    'sample',
    ['sample', 'greedy'],
    'Test: sample actions as the paper does, or take the most probable one.',
)
flags.DEFINE_string('checkpoint', '', 'Test: a checkpoint other than the newest, for instance '
                    'RUN/checkpoints/ckpt-3.')  # fmt: skip
flags.DEFINE_boolean('watch', False, 'Test the newest checkpoint and each one that follows.')
flags.DEFINE_integer(
    'save_video', 0, 'Test: episodes per level to write as videos.', lower_bound=0, upper_bound=1000
)

flags.DEFINE_integer(
    'task',
    -1,
    'Number of a distributed job, from 0; -1 on a single machine.',
    lower_bound=-1,
    upper_bound=100_000,
)
flags.DEFINE_enum(
    'job_name', 'learner', ['learner', 'actor', 'replay'], 'Kind of a distributed job.'
)
flags.DEFINE_string('learner_address', 'localhost:8000', 'Distributed: host:port of the learner.')
flags.DEFINE_list(
    'learner_addresses',
    [],
    'In place of --learner_address, for several learners that train one model: host:port of each, '
    'by --task; actor jobs are shared out by --task modulo their number. A learner also uses the '
    'ports 1000 and 2000 above its own.',
)
flags.DEFINE_list(
    'learner_devices',
    [],
    'Devices that share each batch of a learner, as /gpu:0,/gpu:1; empty: the first GPU, or the '
    'CPU; with --learner_addresses, all GPUs.',
)
flags.DEFINE_list(
    'replay_addresses',
    [],
    'host:port of each replay job, by --task, for them and for the learner; empty: the learner '
    'holds the replay in its own memory.',
)
flags.DEFINE_integer(
    'envs_per_actor', 1, 'Environments of an actor job.', lower_bound=1, upper_bound=10_000
)
flags.DEFINE_float(
    'reconnect_timeout',
    600.0,
    'Seconds that an actor job waits for a learner that is not there.',
    lower_bound=0,
    upper_bound=1e8,
)
flags.DEFINE_enum(
    'actor_device', 'cpu', ['cpu', 'gpu'], 'What the agent of an actor job computes on.'
)
flags.DEFINE_boolean(
    'trusted_network',
    False,
    'Nobody but the jobs of the run reaches those that listen: do not warn that they do.',
)

flags.DEFINE_integer(
    'total_environment_frames',
    1_000_000_000,
    'Frames to train for.',
    lower_bound=1,
    upper_bound=10**15,
)
flags.DEFINE_integer(
    'stop_at_frames',
    0,
    'Frames of the whole run at which it is saved and ends for now, though the learning rate falls '
    'over all of --total_environment_frames; 0: only then.',
    lower_bound=0,
    upper_bound=10**15,
)
flags.DEFINE_integer('num_actors', 4, 'Environments.', lower_bound=1, upper_bound=10_000)
flags.DEFINE_integer(
    'envs_per_process',
    1,
    'Environments that take turns in one process; with few cores, several are faster.',
    lower_bound=1,
    upper_bound=10_000,
)
flags.DEFINE_integer(
    'batch_size',
    2,
    'Unrolls per update of the learner; of several, of each.',
    lower_bound=1,
    upper_bound=100_000,
)
flags.DEFINE_integer(
    'unroll_length', 100, 'Agent steps per unroll.', lower_bound=1, upper_bound=100_000
)
flags.DEFINE_integer(
    'loaders',
    0,
    'Threads that assemble batches and move them to each device of the learner, and as many '
    'batches that are ready or in the making ahead of it; 0: 2 for GPUs, 1 for CPUs.',
    lower_bound=0,
    upper_bound=64,
)
flags.DEFINE_integer(
    'num_action_repeats',
    None,
    'Frames per agent step. Default: 4 for Atari, DeepMind Lab and VizDoom, 1 for others.',
    lower_bound=1,
    upper_bound=10_000,
)
flags.DEFINE_integer('seed', 1, 'Seed of everything random.', lower_bound=0, upper_bound=2**29)

flags.DEFINE_enum(
    'loss',
    'vtrace',
    ['vtrace', 'appo'],
    "The paper's V-trace policy gradient, or the clipped surrogate of asynchronous PPO.",
)
flags.DEFINE_float(
    'clip_epsilon', 0.2, 'appo: bounds the ratio of policies.', lower_bound=1e-6, upper_bound=1e6
)
flags.DEFINE_integer(
    'target_update_steps',
    0,
    'appo: updates between those of the target network of IMPACT; 0 for none.',
    lower_bound=0,
    upper_bound=10**9,
)
flags.DEFINE_float(
    'clip_target_rho_threshold',
    2.0,
    "appo: IMPACT's rho, which bounds mu / pi_target.",
    lower_bound=1,
    upper_bound=1e9,
)
flags.DEFINE_float(
    'kl_cost', 0.0, 'appo: weight of a divergence penalty.', lower_bound=0, upper_bound=1e6
)
flags.DEFINE_boolean(
    'normalize_advantages', False, 'appo: to mean 0 and standard deviation 1 in every batch.'
)
flags.DEFINE_boolean(
    'gae_advantages', False, 'appo: advantages of GAE, with --vtrace_lambda, not those of V-trace.'
)
flags.DEFINE_integer(
    'sample_reuse', 1, 'Updates made of each batch.', lower_bound=1, upper_bound=10_000
)
flags.DEFINE_integer(
    'reuse_buffer',
    1,
    'Batches held for that: the last so many; 1: in a row.',
    lower_bound=1,
    upper_bound=10_000,
)
flags.DEFINE_float(
    'replay_fraction',
    0.0,
    'Fraction of the unrolls of each batch that are replayed, drawn from those of before.',
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_integer(
    'replay_capacity',
    10_000,
    'Unrolls held for that, by all replay jobs together if there are any; the oldest go.',
    lower_bound=1,
    upper_bound=10**9,
)
flags.DEFINE_float(
    'entropy_cost', 0.00025, 'Weight of the entropy bonus.', lower_bound=0, upper_bound=1e6
)
flags.DEFINE_float(
    'final_entropy_cost',
    None,
    'What that weight turns into, linearly over the run; default: it stays.',
    lower_bound=0,
    upper_bound=1e6,
)
flags.DEFINE_float(
    'baseline_cost', 0.5, 'Weight of the baseline loss.', lower_bound=0, upper_bound=1e6
)
flags.DEFINE_float('discounting', 0.99, 'Discount per agent step.', lower_bound=0, upper_bound=1)
flags.DEFINE_enum(
    'reward_clipping',
    'abs_one',
    ['abs_one', 'soft_asymmetric', 'none'],
    'How rewards are clipped for learning.',
)
flags.DEFINE_float('clip_rho_threshold', 1.0, "V-trace's rho-bar.", lower_bound=0, upper_bound=1e9)
flags.DEFINE_float('clip_c_threshold', 1.0, "V-trace's c-bar.", lower_bound=0, upper_bound=1e9)
flags.DEFINE_float(
    'clip_pg_rho_threshold', 1.0, 'rho-bar of the policy gradient.', lower_bound=0, upper_bound=1e9
)
flags.DEFINE_float('vtrace_lambda', 1.0, "V-trace's lambda.", lower_bound=0, upper_bound=1)

flags.DEFINE_string(
    'level_name',
    'explore_goal_locations_small',
    'Level: a Gymnasium id (ALE/Pong-v5), a DeepMind Lab level, or module:callable; several with '
    'commas between; or a suite: dmlab30, atari57, or the path of a CSV file.',
)
flags.DEFINE_boolean(
    'allow_level_change',
    False,
    'Go on with a run on other levels than before; its logs are then of both.',
)
flags.DEFINE_integer(
    'width',
    96,
    'Of the frames, pixels. Atari: 84 by 84 instead of 96 by 72.',
    lower_bound=1,
    upper_bound=4096,
)
flags.DEFINE_integer(
    'height', 72, 'Of the frames, pixels. Atari: see --width.', lower_bound=1, upper_bound=4096
)
flags.DEFINE_string('dataset_path', '', "DeepMind Lab: the psychlab levels' images.")
flags.DEFINE_string(
    'level_cache_dir',
    os.path.join(os.path.expanduser('~'), '.cache', 'impala', 'dmlab_levels'),
    'DeepMind Lab: folder of compiled maps; empty for none.',
)
flags.DEFINE_float(
    'level_cache_gb',
    10.0,
    'DeepMind Lab: gigabytes of that folder, the least recently used maps go.',
    lower_bound=0,
    upper_bound=1e6,
)
flags.DEFINE_boolean('full_action_set', False, "Atari: all 18 actions, not the game's own.")
flags.DEFINE_float(
    'sticky_actions', 0.0, 'Atari: probability that a frame repeats the last action.',
    lower_bound=0, upper_bound=0.999,
)  # fmt: skip
flags.DEFINE_boolean('end_episode_on_life_loss', False, 'Atari: a lost life ends the episode.')
flags.DEFINE_integer(
    'max_noops', 30, 'Atari: up to so many no-ops at the start.', lower_bound=0, upper_bound=10_000
)
flags.DEFINE_integer(
    'frames_per_noop',
    1,
    'Atari: frames that each of them lasts.',
    lower_bound=1,
    upper_bound=10_000,
)
flags.DEFINE_integer(
    'frame_stack', 4, 'Atari: frames in an observation.', lower_bound=1, upper_bound=256
)

flags.DEFINE_enum(
    'torso',
    'auto',
    ['auto', 'shallow', 'deep', 'nature', 'mlp', 'autoencoder'],
    'Network before the core; auto: shallow for Atari, mlp for vectors, deep otherwise.',
)
flags.DEFINE_integer(
    'latent_size',
    64,
    'autoencoder: numbers that it makes of a frame.',
    lower_bound=1,
    upper_bound=65_536,
)
flags.DEFINE_float(
    'autoencoder_cost',
    1.0,
    'autoencoder: weight of the squared error of pixels.',
    lower_bound=0,
    upper_bound=1e6,
)
flags.DEFINE_enum(
    'initializer',
    'truncated_normal',
    ['truncated_normal', 'orthogonal'],
    'Weights that a run begins with: as in the released code, or as of PPO.',
)
flags.DEFINE_enum(
    'use_lstm',
    'auto',
    ['auto', 'true', 'false'],
    'LSTM core; auto: not for Atari and vectors.',
)
flags.DEFINE_boolean(
    'popart',
    False,
    'Normalise values per level (PopArt), for levels of different rewards; usually together with '
    '--reward_clipping=none.',
)
flags.DEFINE_enum(
    'compute_dtype',
    'float32',
    ['float32', 'bfloat16', 'auto'],
    "What the learner's torso computes in; auto: bfloat16 on CPUs that have instructions for it.",
)

flags.DEFINE_float(
    'learning_rate', 0.00048, 'At the start of the run.', lower_bound=0, upper_bound=1e6
)
flags.DEFINE_float(
    'final_learning_rate',
    0.0,
    'What --learning_rate turns into, linearly over the run; the same value keeps it constant.',
    lower_bound=0,
    upper_bound=1e6,
)
flags.DEFINE_enum('optimizer', 'rmsprop', ['rmsprop', 'adam'], 'What applies the gradients.')
flags.DEFINE_float('decay', 0.99, "RMSProp's decay.", lower_bound=0, upper_bound=1)
flags.DEFINE_float('momentum', 0.0, "RMSProp's momentum.", lower_bound=0, upper_bound=1)
# A weight that has had no gradient as yet is divided by the root of no more than these.
flags.DEFINE_float(
    'epsilon', 0.1, "RMSProp's epsilon, inside the root.", lower_bound=1e-15, upper_bound=1e6
)
flags.DEFINE_float('adam_beta1', 0.9, 'Of the mean.', lower_bound=0, upper_bound=0.999999)
flags.DEFINE_float('adam_beta2', 0.999, 'Of the mean square.', lower_bound=0, upper_bound=0.999999)
flags.DEFINE_float(
    'adam_epsilon', 1e-8, "Adam's epsilon, beside the root.", lower_bound=1e-15, upper_bound=1e6
)
flags.DEFINE_float(
    'gradient_clip_norm',
    0.0,
    'Global norm to clip gradients to; 0 for none.',
    lower_bound=0,
    upper_bound=1e9,
)

flags.DEFINE_integer(
    'intra_op_threads',
    0,
    'Threads that share an operation on the CPU; 0: one per core.',
    lower_bound=0,
    upper_bound=1024,
)
flags.DEFINE_integer(
    'inference_batch_size',
    0,
    'Requests that make a batch; 0: half the actors.',
    lower_bound=0,
    upper_bound=10_000,
)
flags.DEFINE_float(
    'inference_timeout_ms',
    20.0,
    'Milliseconds after which fewer make a batch.',
    lower_bound=0,
    upper_bound=600_000,
)
flags.DEFINE_integer(
    'queue_capacity',
    1,
    'Full unrolls that may wait for the learner.',
    lower_bound=1,
    upper_bound=1_000_000,
)
flags.DEFINE_integer(
    'max_actor_restarts',
    3,
    'Restarts in a row of one actor before the run stops.',
    lower_bound=0,
    upper_bound=10**6,
)
flags.DEFINE_float(
    'silence_secs',
    60.0,
    'Seconds that an environment may take for a step, or to be made, before that is reported; 0: '
    'never.',
    lower_bound=0,
    upper_bound=1e9,
)
flags.DEFINE_float(
    'actor_timeout',
    600.0,
    'Seconds after which its process is killed and restarted; 0: never.',
    lower_bound=0,
    upper_bound=1e9,
)
flags.DEFINE_float(
    'save_checkpoint_secs',
    600.0,
    'Seconds of training between checkpoints.',
    lower_bound=0,
    upper_bound=1e9,
)
flags.DEFINE_float(
    'log_secs', 10.0, 'Seconds between lines of metrics.jsonl.', lower_bound=0, upper_bound=1e9
)

BAD_INPUT_EXIT_CODE = 2
LEARNER_LOST_EXIT_CODE = 3
UNROLLS_LOST_EXIT_CODE = 4

# What a job of another kind would leave out of account without a word.
_FLAGS_OF_ACTOR_JOBS = ('envs_per_actor', 'reconnect_timeout', 'actor_device')
# Of these a run that goes on may be given others, and nothing it says means anything else then.
_FREE_FLAGS = (
    *flag_file.NOT_OF_THE_RUN,
    *_FLAGS_OF_ACTOR_JOBS,
    'task',
    'job_name',
    'learner_address',
    'trusted_network',
    'dataset_path',
    'level_cache_dir',
    'level_cache_gb',
    'save_checkpoint_secs',
    'log_secs',
    'silence_secs',
    'actor_timeout',
)
_SCHEDULE_FLAGS = (
    'total_environment_frames',
    'learning_rate',
    'final_learning_rate',
    'entropy_cost',
    'final_entropy_cost',
)
_LONGEST_REASON = 400


def main(unused_argv: list[str]) -> int:
    """Does what the flags say; returns the exit code."""
    # TensorFlow takes seconds to load: what can be answered without it is answered before.
    for name in ('logdir', 'level_cache_dir', 'dataset_path', 'checkpoint'):
        # A shell expands ~ only at the start of a word.
        FLAGS[name].value = os.path.expanduser(str(FLAGS[name].value))
    refusal = _refusal_of_values() or _refusal_of_jobs() or _refusal_of_unused()
    if refusal:
        return _fail(refusal, BAD_INPUT_EXIT_CODE)
    if FLAGS.job_name == 'replay':
        return _serve_replay()
    is_actor = FLAGS.job_name == 'actor'
    is_one_of_several = _is_one_of_several_learners()
    logging.set_verbosity(logging.ERROR)
    with starting_tensorflow():
        import tensorflow as tf

        if FLAGS.intra_op_threads:
            tf.config.threading.set_intra_op_parallelism_threads(FLAGS.intra_op_threads)
        if FLAGS.mode == 'test':
            # Nothing but acting: what other threads do, most of all looking for work, is at the
            # environments' cost.
            tf.config.threading.set_inter_op_parallelism_threads(1)
        if is_actor and FLAGS.actor_device == 'cpu':
            tf.config.set_visible_devices([], 'GPU')
        trains = not is_actor and FLAGS.mode == 'train'
        if not (trains and (FLAGS.learner_devices or is_one_of_several)):
            tf.config.list_logical_devices()
    from impala.acting.actor_pool import UnrollsLostError
    from impala.acting.actor_processes import ActorError
    from impala.cluster.actor_job import ActorJobError, LearnerLost
    from impala.cluster.learner_group import LearnerGroupError
    from impala.cluster.transport import ServerError
    from impala.config import ConfigError
    from impala.errors import LevelError
    from impala.learning import devices as learner_devices
    from impala.runs import checkpoint
    from impala.runs import files as run_files
    from impala.training import TrainingError

    try:
        if is_actor:
            return _act()
        if FLAGS.mode == 'test':
            return _test()
        if FLAGS.learner_devices or is_one_of_several:
            learner_devices.prepare(FLAGS.learner_devices, is_one_of_several)
        if is_one_of_several and FLAGS.task > 0:
            return _train_with_first()
        lock = run_files.lock_logdir(FLAGS.logdir)
        try:
            run_files.try_checkpoint_folder(FLAGS.logdir)
            return _train()
        finally:
            os.close(lock)
    except (ConfigError, LevelError, ServerError, checkpoint.LogdirError) as error:
        return _fail(str(error), BAD_INPUT_EXIT_CODE)
    except (ActorError, ActorJobError, LearnerGroupError, TrainingError) as error:
        return _fail(str(error), 1)
    except LearnerLost as error:
        return _fail(str(error), LEARNER_LOST_EXIT_CODE)
    except UnrollsLostError as error:
        if error.checkpoint is not None:
            _print_end(error.checkpoint)
        return _fail(str(error), UNROLLS_LOST_EXIT_CODE)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, INTERRUPTED_EXIT_CODE)


def _refusal_of_values() -> str | None:
    """Returns what is wrong with the value of a flag; absl has looked at types and bounds."""
    for flag in _own_flags():
        texts = flag.value if isinstance(flag.value, list) else [flag.value]
        for text in texts:
            if isinstance(text, float) and not math.isfinite(text):
                return f'--{flag.name}={text} is not a finite number.'
            if isinstance(text, str) and not text.isprintable():
                return f'--{flag.name}={text!r} has characters that cannot be printed in it.'
    for name in ('logdir', 'level_cache_dir', 'dataset_path', 'checkpoint'):
        if re.match(r'[a-z][a-z0-9+.-]*://', str(FLAGS[name].value), re.IGNORECASE):
            return (
                f'--{name}={FLAGS[name].value} is not a path of this machine: give one, for '
                'instance of a folder where that storage is mounted.'
            )
    if not FLAGS.logdir:
        return '--logdir is empty: give the folder of the run.'
    return None


def _refusal_of_jobs() -> str | None:
    """Returns what is wrong with the kind and the number of a distributed job."""
    if FLAGS.job_name == 'replay':
        return _refusal_of_replay_job()
    is_actor = FLAGS.job_name == 'actor'
    if is_actor and (FLAGS.task < 0 or FLAGS.mode == 'test'):
        return '--job_name=actor needs a number of its own, --task=0 or more, and --mode=train.'
    if is_actor and FLAGS.replay_addresses:
        return (
            '--replay_addresses is for the learner and for replay jobs: leave it out of an actor '
            'job, which has nothing to do with them.'
        )
    if not is_actor and FLAGS.task > 0 and not _is_one_of_several_learners():
        return (
            f'--task={FLAGS.task}: there can be one learner only, --task=0, unless '
            '--learner_addresses has several.'
        )
    if _is_one_of_several_learners() and FLAGS.task < 0:
        return '--learner_addresses needs the number of this learner, --task=0 or more.'
    return None


def _refusal_of_replay_job() -> str | None:
    addresses = FLAGS.replay_addresses
    if not addresses:
        return '--job_name=replay needs --replay_addresses=host:port,... of all replay jobs.'
    if not 0 <= FLAGS.task < len(addresses) or FLAGS.mode == 'test':
        return (
            f'--job_name=replay needs a number of its own, --task=0 to {len(addresses) - 1}, the '
            'place of its address in --replay_addresses, and --mode=train.'
        )
    if FLAGS.replay_capacity < len(addresses):
        return (
            f'--replay_capacity={FLAGS.replay_capacity} leaves nothing for some of '
            f'{len(addresses)} replay jobs: give --replay_capacity={len(addresses)} or more.'
        )
    return None


def _refusal_of_unused() -> str | None:
    """Returns which flag would have no effect in this mode or kind of job.

    A flag file may be shared by jobs of all kinds; on the command line of the wrong one a flag is
    a mistake.
    """
    given = {flag_file.Argument(text).name for text in sys.argv[1:]}
    changed = [name for name in given & {*FLAGS} if FLAGS[name].value != FLAGS[name].default]
    for name in flag_file.TEST_FLAGS:
        if name in changed and FLAGS.mode == 'train':
            return f'{_shown(name)} is for tests: give --mode=test, too, or leave it out.'
    for name in _FLAGS_OF_ACTOR_JOBS:
        if name in changed and FLAGS.job_name != 'actor':
            return f'{_shown(name)} is for actor jobs (--job_name=actor): leave it out here.'
    if FLAGS.mode == 'train' and FLAGS.task < 0:
        for name in ('learner_address', 'learner_addresses'):
            if name in changed:
                return (
                    f'{_shown(name)} is for distributed jobs, which have a number: give '
                    '--task=0, for instance, too, or leave it out to train on this machine alone.'
                )
        if 'job_name' in given and not FLAGS['task'].present:
            return (
                '--job_name=learner needs --task=0 for actor jobs to find it: give that, too, or '
                'leave it out to train on this machine alone.'
            )
    return None


def _shown(name: str) -> str:
    """Returns a flag as it is given on a command line."""
    return FLAGS[name].serialize()


def _is_one_of_several_learners() -> bool:
    return (
        FLAGS.job_name == 'learner' and FLAGS.mode == 'train' and len(FLAGS.learner_addresses) > 1
    )


def _serve_replay() -> int:
    """Holds a part of the experience replay: neither environments nor a network are needed."""
    addresses = FLAGS.replay_addresses
    logging.set_verbosity(logging.ERROR)
    with starting_tensorflow():
        import tensorflow as tf

        tf.config.set_visible_devices([], 'GPU')
        tf.config.list_logical_devices()
    from impala.cluster import replay_job
    from impala.cluster import transport as remote

    config = replay_job.ReplayJobConfig(
        task=FLAGS.task,
        addresses=tuple(addresses),
        capacity=FLAGS.replay_capacity,
        seed=FLAGS.seed,
        trusted_network=FLAGS.trusted_network,
    )
    try:
        for address in addresses:
            remote.split_address(address)
        print(replay_job.run(config, lambda text: print(text, file=sys.stderr)))
        return 0
    except remote.ServerError as error:
        return _fail(str(error), BAD_INPUT_EXIT_CODE)
    except replay_job.ReplayJobError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, INTERRUPTED_EXIT_CODE)


def _interruptible_start() -> None:
    """Makes SIGINT and SIGTERM end the process with a sentence as long as it holds nothing.

    An exception, which Python would raise, can turn up anywhere in the modules being imported and
    comes out of some of them as another one.
    """
    # TensorFlow's loading has the terminal's descriptor moved away for a while.
    terminal = os.dup(sys.stderr.fileno())

    def end(number: int, frame: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(terminal, f'{INTERRUPTED}\n'.encode())
        os._exit(128 + number)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)


def _train() -> int:
    from impala.runs import checkpoint

    def accept() -> None:
        if checkpoint.checkpoint_paths(FLAGS.logdir):
            _report_changes()
        checkpoint.write_flags(FLAGS.logdir, _flags_text())

    path = _learn(accept)
    if path is None:
        return _fail(
            'Stopped before the first update: there is no checkpoint yet.', INTERRUPTED_EXIT_CODE
        )
    _print_end(path)
    return 0


def _print_end(path: str) -> None:
    """Says how far a run has come; `path` is that of its last checkpoint."""
    from impala.runs import run_summary

    summary = run_summary.read_summary(FLAGS.logdir)
    print(run_summary.describe_summary(summary))
    print(f'Checkpoint: {path}')
    if 0 < FLAGS.stop_at_frames <= summary['frames'] < FLAGS.total_environment_frames:
        print(f'Stopped at --stop_at_frames={FLAGS.stop_at_frames}; without it the run goes on.')
    elif summary['frames'] < FLAGS.total_environment_frames:
        print('The same command goes on from there.')
    else:
        print('The run is complete; a larger --total_environment_frames goes on from there.')


def _train_with_first() -> int:
    """Trains with others as a learner that is not the first, which leaves no files."""
    _learn(lambda: None)
    print('The first learner has the checkpoint.')
    return 0


def _learn(on_accepted: Callable[[], None]) -> str | None:
    """Trains; see `training.train`."""
    from impala import training
    from impala.cluster import transport as remote
    from impala.cluster.learner_group import Member

    member, address = None, None
    if FLAGS.task >= 0:
        address = _own_address()
        remote.split_address(address)
        if len(FLAGS.learner_addresses) > 1:
            member = Member(tuple(FLAGS.learner_addresses), FLAGS.task)
    config = _config()
    # So that a test of one of many games knows of it.
    FLAGS.full_action_set = config.environment.full_action_set
    placement = training.Placement(address, member, FLAGS.learner_devices, FLAGS.trusted_network)
    return training.train(config, on_accepted, placement)


def _report_changes() -> None:
    """Says which flags the run in --logdir has had other values of."""
    path = os.path.join(FLAGS.logdir, flag_file.FLAG_FILE)
    try:
        stored = _stored_values(path)
    except flag_file.FlagFileError as error:
        print(
            f'WARNING: {error} So it cannot be said which flags are other than before.',
            file=sys.stderr,
        )
        return
    own = {flag.name: flag for flag in _own_flags() if flag.name not in _FREE_FLAGS}
    changes = flag_file.changes(
        stored,
        {name: flag.value for name, flag in own.items()},
        {name: flag.default for name, flag in own.items()},
    )
    if changes:
        print(f'Other flags than before: {", ".join(changes.values())}.', file=sys.stderr)
    if not changes.keys().isdisjoint(_SCHEDULE_FLAGS):
        print(
            'Learning rate and entropy cost are from now on what they would be at this frame if '
            'the run had begun with the new flags.',
            file=sys.stderr,
        )


def _stored_values(path: str) -> dict[str, Any]:
    """Returns the values in the flag file of a run, by name.

    Raises:
      FlagFileError: it cannot be read, or a value makes no sense.
    """
    values: dict[str, Any] = {}
    own = {flag.name: flag for flag in _own_flags()}
    for argument in flag_file.read(path):
        name, has_value, text = argument.text.lstrip('-').partition('=')
        negated = name.removeprefix('no')
        if not has_value and name not in own and negated in own and own[negated].boolean:
            name, text = negated, 'false'
        elif not has_value:
            text = 'true'
        # A flag that there is no more has no effect.
        if name in own:
            try:
                values[name] = own[name].parser.parse(text)
            except (ValueError, TypeError) as error:
                reason = flag_file.plainly(f'flag --{name}={text}: {error}').removesuffix('.')
                raise flag_file.FlagFileError(f'{argument.origin}: {reason}.') from error
    return values


def _own_address() -> str:
    """Returns the address of this learner, or of the one that this actor job belongs to."""
    addresses = FLAGS.learner_addresses or [FLAGS.learner_address]
    return addresses[FLAGS.task % len(addresses)]


def _act() -> int:
    from impala.cluster import actor_job
    from impala.config import environment_settings

    config = dataclasses.replace(_config(), num_actors=FLAGS.envs_per_actor)
    shaping = {
        'torso': FLAGS.torso,
        'use_lstm': {'auto': None, 'true': True, 'false': False}[FLAGS.use_lstm],
        'unroll_length': FLAGS.unroll_length,
        'popart': FLAGS.popart,
        'latent_size': FLAGS.latent_size,
    }
    job = actor_job.ActorJobConfig(
        task=FLAGS.task,
        learner_address=_own_address(),
        reconnect_timeout=FLAGS.reconnect_timeout,
        shaping_flags={
            name: value
            for name, value in shaping.items()
            if FLAGS[name].present and value not in ('auto', None)
        }
        | {
            name: FLAGS[name].value
            for name in environment_settings(config.environment)
            if FLAGS[name].present
        },
        takes_levels=not FLAGS['level_name'].present,
    )
    print(actor_job.run(config, job, lambda text: print(text, file=sys.stderr)))
    return 0


def _test() -> int:
    from impala.evaluation import report as test_report
    from impala.evaluation import test_mode as evaluation

    path = FLAGS.checkpoint.removesuffix('.index')
    if path and not FLAGS['logdir'].present:
        FLAGS.logdir = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    if FLAGS.watch and not path:
        _await_run()
    _restore_flags()
    try:
        returns = evaluation.evaluate(
            _config(),
            evaluation.EvaluationConfig(
                num_episodes=FLAGS.test_num_episodes,
                policy=FLAGS.test_policy,
                checkpoint=path or None,
                watch=FLAGS.watch,
                num_videos=FLAGS.save_video,
                max_frames=FLAGS.test_max_frames,
            ),
            lambda text: print(text, flush=True),
        )
    except evaluation.EvaluationInterrupted as error:
        return _fail(str(error), INTERRUPTED_EXIT_CODE)
    if returns is None:
        return _fail('Interrupted; nothing was written.', INTERRUPTED_EXIT_CODE)
    print(f'Written to {os.path.join(FLAGS.logdir, test_report.SCORES_FILE)}')
    return 0


def _config() -> Any:
    """Returns the `TrainingConfig` that the flags describe."""
    from impala import suites
    from impala.acting.silence import SilenceLimits
    from impala.config import TrainingConfig, with_common_actions
    from impala.environments import EnvironmentConfig
    from impala.learning.learner import LearnerConfig

    if FLAGS.level_name.endswith('.csv'):
        # The run may be resumed and tested from another folder.
        FLAGS.level_name = os.path.abspath(os.path.expanduser(FLAGS.level_name))
    suite = suites.load(FLAGS.level_name)
    if FLAGS.mode == 'test':
        suite = suite.for_testing()
    return TrainingConfig(
        logdir=FLAGS.logdir,
        level_names=suite.level_names,
        suite=suite,
        seed=FLAGS.seed,
        num_actors=FLAGS.num_actors,
        envs_per_process=FLAGS.envs_per_process,
        total_environment_frames=FLAGS.total_environment_frames,
        stop_at_frames=FLAGS.stop_at_frames,
        allow_level_change=FLAGS.allow_level_change,
        loaders=FLAGS.loaders,
        torso=FLAGS.torso,
        use_lstm={'auto': None, 'true': True, 'false': False}[FLAGS.use_lstm],
        compute_dtype=FLAGS.compute_dtype,
        popart=FLAGS.popart,
        latent_size=FLAGS.latent_size,
        initializer=FLAGS.initializer,
        replay_addresses=tuple(FLAGS.replay_addresses),
        learner=LearnerConfig(
            batch_size=FLAGS.batch_size,
            unroll_length=FLAGS.unroll_length,
            sample_reuse=FLAGS.sample_reuse,
            reuse_buffer=FLAGS.reuse_buffer,
            replay_fraction=FLAGS.replay_fraction,
            replay_capacity=FLAGS.replay_capacity,
            loss=FLAGS.loss,
            discounting=FLAGS.discounting,
            entropy_cost=FLAGS.entropy_cost,
            final_entropy_cost=FLAGS.final_entropy_cost,
            baseline_cost=FLAGS.baseline_cost,
            reward_clipping=FLAGS.reward_clipping,
            clip_rho_threshold=FLAGS.clip_rho_threshold,
            clip_c_threshold=FLAGS.clip_c_threshold,
            clip_pg_rho_threshold=FLAGS.clip_pg_rho_threshold,
            lambda_=FLAGS.vtrace_lambda,
            clip_epsilon=FLAGS.clip_epsilon,
            clip_target_rho_threshold=FLAGS.clip_target_rho_threshold,
            target_update_steps=FLAGS.target_update_steps,
            kl_cost=FLAGS.kl_cost,
            normalize_advantages=FLAGS.normalize_advantages,
            gae_advantages=FLAGS.gae_advantages,
            autoencoder_cost=FLAGS.autoencoder_cost,
            learning_rate=FLAGS.learning_rate,
            final_learning_rate=FLAGS.final_learning_rate,
            optimizer=FLAGS.optimizer,
            decay=FLAGS.decay,
            momentum=FLAGS.momentum,
            epsilon=FLAGS.epsilon,
            adam_beta1=FLAGS.adam_beta1,
            adam_beta2=FLAGS.adam_beta2,
            adam_epsilon=FLAGS.adam_epsilon,
            gradient_clip_norm=FLAGS.gradient_clip_norm or None,
        ),
        environment=with_common_actions(
            EnvironmentConfig(
                width=FLAGS.width,
                height=FLAGS.height,
                num_action_repeats=FLAGS.num_action_repeats,
                full_action_set=FLAGS.full_action_set,
                sticky_actions=FLAGS.sticky_actions,
                end_episode_on_life_loss=FLAGS.end_episode_on_life_loss,
                max_noops=FLAGS.max_noops,
                frames_per_noop=FLAGS.frames_per_noop,
                frame_stack=FLAGS.frame_stack,
                dataset_path=FLAGS.dataset_path,
                level_cache_dir=FLAGS.level_cache_dir or None,
                level_cache_gb=FLAGS.level_cache_gb,
            ),
            suite.level_names,
        ),
        inference_batch_size=FLAGS.inference_batch_size,
        inference_timeout_ms=FLAGS.inference_timeout_ms,
        queue_capacity=FLAGS.queue_capacity,
        max_actor_restarts=FLAGS.max_actor_restarts,
        silence=SilenceLimits(FLAGS.silence_secs, FLAGS.actor_timeout),
        save_checkpoint_secs=FLAGS.save_checkpoint_secs,
        log_secs=FLAGS.log_secs,
    )


def _own_flags() -> list[flags.Flag]:
    return FLAGS.flags_by_module_dict()[sys.argv[0]]


def _flags_text() -> str:
    # Whoever goes on with the run from its flag file means to go on, wherever the file is then.
    lines = [
        flag.serialize()
        for flag in _own_flags()
        if flag.value is not None and flag.name not in flag_file.NOT_OF_THE_RUN
    ]
    return ''.join(line + '\n' for line in lines)


def _await_run() -> None:
    """Waits until --logdir is the folder of a training run."""
    from impala.runs import files as run_files

    path = os.path.join(FLAGS.logdir, run_files.FLAG_FILE)
    if not os.path.exists(path):
        print(f'Waiting for a training run in {FLAGS.logdir}', flush=True)
        while not os.path.exists(path):
            time.sleep(1)


def _restore_flags() -> None:
    """Takes the flags of the run in --logdir, but for those on the command line."""
    from impala.runs import checkpoint

    path = os.path.join(FLAGS.logdir, checkpoint.FLAG_FILE)
    if not os.path.isfile(path):
        raise checkpoint.LogdirError(
            f'{FLAGS.logdir} is not the folder of a training run ({path} is missing): '
            'give its --logdir.'
        )
    given = {flag.name for flag in _own_flags() if flag.present} | {*flag_file.NOT_OF_THE_RUN}
    try:
        stored = flag_file.read(path)
        _parse([line for line in stored if not given & {line.name, line.name.removeprefix('no')}])
    except flag_file.FlagFileError as error:
        raise checkpoint.LogdirError(f'Cannot restore the flags of the run: {error}') from error


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _parse(arguments: Sequence[flag_file.Argument]) -> list[str]:
    """Sets the flags; returns the arguments that are none, behind the program.

    Raises:
      FlagFileError: one sentence about what makes no sense, and where it stands if in a file.
    """
    try:
        return FLAGS([sys.argv[0], *(argument.text for argument in arguments)])
    except (flags.Error, ValueError) as error:
        # The latter for --nopopart=1. What the user has given is repeated, whatever it is.
        reason = flag_file.plainly(str(error))
        if len(reason) > _LONGEST_REASON:
            reason = f'{reason[:_LONGEST_REASON]}...'
        for argument in arguments:
            name = re.escape(argument.name)
            if argument.origin and name and re.search(rf"--{name}\b|'{name}'", reason):
                reason = f'{argument.origin}: {reason}'
                break
        raise flag_file.FlagFileError(reason) from error


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = _parse(flag_file.expand(argv[1:]))
    except flag_file.FlagFileError as error:
        sys.exit(_fail(f'{error}\n`{argv[0]} --helpshort` lists the flags.', BAD_INPUT_EXIT_CODE))
    if len(rest) > 1:
        sys.exit(_fail(f'{rest[1]!r} is not a flag: flags start with --.', BAD_INPUT_EXIT_CODE))
    return rest


if __name__ == '__main__':
    outlive_readers()
    _interruptible_start()
    # Else Python looks for garbage among all of TensorFlow's objects before it ends, which takes
    # more than a second. What has to be brought to an end is by then.
    atexit.register(gc.freeze)
    app.run(main, flags_parser=_parse_flags)
