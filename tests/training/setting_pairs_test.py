"""Short runs with all pairs of values of settings; see `setting_pairs`."""

import json
import signal

import numpy as np
import pytest
from chosen_runs import num_devices, num_frames, run_of, train, train_on_devices
from command_line import PATIENCE_SECONDS, WarmRun
from ports import free_ports
from setting_pairs import CHOICES, REFUSED, RUNS, all_pairs, choices, pairs
from warm_process import context

from impala.config import ConfigError

NUM_CANDIDATES = 100


def _refusal(choice):
    """Returns why a choice is refused, or None if it is accepted."""
    try:
        run_of('nowhere', choice)
    except ConfigError as error:
        return str(error)
    return None


def _accepted():
    """Returns the choices of runs, and random ones, that are accepted."""
    random = np.random.default_rng(0)
    accepted = choices()
    for _ in range(NUM_CANDIDATES):
        choice = {name: values[random.integers(len(values))] for name, values in CHOICES.items()}
        for name in random.permutation(list(CHOICES)).tolist():
            if _refusal(choice) is None:
                break
            choice[name] = CHOICES[name][0]
        accepted.append(choice)
    return accepted


def test_only_pairs_refused_by_name_never_train():
    trained = set().union(*map(pairs, choices()))
    assert all_pairs() - trained == REFUSED
    accepted = _accepted()
    for (name, value), (other, other_value) in REFUSED:
        # Refused whatever else is chosen; without another reason, the refusal names both flags.
        refusals = [
            _refusal(choice | {name: value}) for choice in accepted if choice[other] == other_value
        ]
        assert None not in refusals
        assert any(f'--{name}' in text and f'--{other}' in text for text in refusals)


@pytest.fixture(scope='module')
def shard(tmp_path_factory):
    """The address of a replay job."""
    address = f'localhost:{free_ports(1)[0]}'
    flags = ('--job_name=replay', '--task=0', f'--replay_addresses={address}', '--trusted_network')
    with WarmRun(tmp_path_factory.mktemp('shard'), *flags) as run:
        run.wait_until(lambda: 'waiting for a learner on port' in run.stderr)
        yield address
        run.send(signal.SIGTERM)
        assert run.wait() == 0, run.stderr


def _train_in_process(*args):
    process = context().Process(target=train_on_devices, args=args)
    process.start()
    process.join(PATIENCE_SECONDS)
    process.kill()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize('number', range(len(RUNS)))
def test_every_pair_of_settings_trains(tmp_path, shard, number):
    choice = choices()[number]
    print(choice)
    logdir = tmp_path / 'run'
    if choice['learner_devices']:
        _train_in_process(logdir, choice, shard)
    else:
        assert train(logdir, choice, shard) == str(logdir / 'checkpoints' / 'ckpt-1')
    assert (logdir / 'checkpoints' / 'ckpt-1.index').exists()
    lines = [json.loads(line) for line in (logdir / 'metrics.jsonl').read_text().splitlines()]
    # Each line is of one update, on a new or a reused batch.
    reused = [line for line in lines if 'reused_policy_lag_mean' in line]
    assert bool(reused) == (choice['sample_reuse'] > 1)
    for line in lines:
        lags = {name for name in line if 'policy_lag' in name}
        assert all(name.startswith('reused_') == (line in reused) for name in lags)
    new = [line for line in lines if line not in reused]
    frames, batch_frames = num_frames(choice), 20 * num_devices(choice)
    if choice['replay_fraction']:
        fractions = [line['replayed_fraction'] for line in new]
        # Less while there was nothing to replay yet, for one of two devices or for both.
        assert set(fractions) <= {0, 0.25, 0.5}
        assert fractions[-1] == 0.5
        assert sum(batch_frames * (1 - each) for each in fractions) == lines[-1]['frames']
        if not choice['replay_addresses'] and not choice['learner_devices']:
            # Each loader may begin with a batch before there is anything to replay.
            assert 1 <= fractions.count(0) <= (choice['loaders'] or 1)
            assert 0.25 not in fractions
        lags = {'replayed_policy_lag_max', 'reused_replayed_policy_lag_max'}
        assert all(bool(lags & line.keys()) == (line['replayed_fraction'] > 0) for line in lines)
        assert all(('replay_jobs' in line) == bool(choice['replay_addresses']) for line in lines)
    else:
        assert len(new) == frames // batch_frames
        assert not any('replay' in name for line in lines for name in line)
    assert frames <= lines[-1]['frames'] < frames + batch_frames
    updates = _uses(len(new), choice['sample_reuse'], choice['reuse_buffer'])
    assert lines[-1]['updates'] == updates == len(lines)
    # Every episode is recorded once.
    episode_steps = 10
    episodes = (logdir / 'episodes.csv').read_text().splitlines()[1:]
    if choice['bootstrap_truncated']:
        # The action for the last observation counts as an agent step, but not in the episode.
        most = lines[-1]['frames'] // (episode_steps + 1)
        assert most - 1 <= len(episodes) <= most
    else:
        assert len(episodes) == lines[-1]['frames'] // episode_steps
    played = {f'{episode_steps}.0,{episode_steps},truncated'}
    assert {line.split(',', 4)[4] for line in episodes} == played
    assert sum(line.get('updates_skipped', 0) for line in lines) == 0
    # The intrinsic reward does not count in the returns of episodes.
    assert all(
        line.get('intrinsic_reward') == (0.25 if choice['hooks'] else None) for line in lines
    )
    assert all(('loss/own' in line) == choice['loss'].startswith('own') for line in lines)
    decodes = choice['torso'] == 'autoencoder' and choice['autoencoder_cost'] > 0
    assert all(('loss/autoencoder' in line) == decodes for line in lines)
    assert (logdir / 'reconstructions.png').exists() == decodes


def _uses(batches, times, buffer_size):
    """Returns the number of updates up to the first use of the last batch, which ends the run."""
    ages = [round(use * (buffer_size - 1) / max(1, times - 1)) for use in range(times)]
    return 1 + sum(age < held for held in range(1, batches) for age in ages)
