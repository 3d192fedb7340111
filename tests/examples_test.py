"""Every example trains, in the way that its docstring says."""

import json
import pathlib
import sys

import numpy as np
import pytest
import tensorflow as tf

from configs import config
from impala import training
from impala.config import ConfigError
from impala.errors import TrainingError
from impala.evaluation import evaluate
from impala.networks.core import OwnCore
from impala.runs.files import LogdirError

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / 'examples'


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for path in EXAMPLES.glob('*.py'):
        sys.modules.pop(path.stem, None)


def metrics_of(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_an_own_torso_trains_and_is_part_of_the_checkpoint(tmp_path):
    run = config(
        tmp_path, level_name='levels:picture', torso='own_torso:VisionTransformer', core='lstm'
    )
    assert training.train(run) is not None
    losses = [line['loss/total'] for line in metrics_of(tmp_path)]
    assert len(losses) == 5
    assert np.isfinite(losses).all()
    longer = run.replace(total_environment_frames=200)
    assert training.train(longer).endswith('ckpt-2')
    with pytest.raises(LogdirError, match='--torso was "own_torso:VisionTransformer" and is now'):
        training.train(longer.replace(torso='deep', total_environment_frames=300))


def test_an_own_core_trains_with_all_that_uses_its_state(tmp_path):
    run = config(
        tmp_path, level_name='levels:picture', core='own_core:AttentionMemory', loss='appo',
        target_update_steps=2, replay_fraction=0.5, sample_reuse=2, compute_dtype='bfloat16',
    )  # fmt: skip
    assert training.train(run).endswith('ckpt-1')
    lines = metrics_of(tmp_path)
    assert lines[-1]['replayed_fraction'] == 0.5
    assert np.isfinite([line['loss/total'] for line in lines]).all()
    assert sum(line.get('updates_skipped', 0) for line in lines) == 0
    network = json.loads((tmp_path / 'network.json').read_text())
    assert network['core'] == 'own_core:AttentionMemory'
    with pytest.raises(LogdirError, match='--core was "own_core:AttentionMemory" and is now "gru"'):
        training.train(run.replace(core='gru', total_environment_frames=300))
    scores = [
        evaluate(run.replace(mode='test', test_num_episodes=3, num_actors=actors), print)
        for actors in (1, 3)
    ]
    assert scores[0] == scores[1]


def test_the_attention_ends_with_the_last_steps_and_with_the_episode():
    import own_core

    steps, features = 20, 5
    core = OwnCore('own_core:AttentionMemory', features)
    inputs = tf.random.stateless_normal([steps, 1, features], [1, 2])
    begins = tf.constant([[t in (0, 14)] for t in range(steps)])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        outputs, _ = core.unroll(inputs, begins, core.initial_state(1))
        sums = [tf.reduce_sum(outputs[t]) for t in (12, 17)]
    for last, total in zip((12, 17), sums, strict=True):
        seen = np.flatnonzero(np.any(tape.gradient(total, inputs).numpy(), axis=(1, 2)))
        assert seen.tolist() == list(
            range(max(last - own_core.STEPS + 1, last // 14 * 14), last + 1)
        )


def test_an_own_loss_logs_its_parts(tmp_path):
    run = config(tmp_path, loss='own_loss:penalized_loss')
    training.train(run)
    for line in metrics_of(tmp_path):
        plain = line['loss/policy_gradient'] + 0.5 * line['loss/baseline']
        plain += 0.00025 * line['loss/entropy']
        np.testing.assert_allclose(
            line['loss/total'], plain + 0.1 * line['loss/penalty'], rtol=1e-4, atol=1e-4
        )


def test_an_own_hook_adds_a_metric_and_stops_the_run(tmp_path, monkeypatch):
    run = config(tmp_path, hooks=('own_hook:EntropyWatch',), total_environment_frames=400)
    training.train(run)
    entropies = [line['mean_entropy'] for line in metrics_of(tmp_path)]
    assert all(0 < entropy <= np.log(2) + 1e-6 for entropy in entropies)
    import own_hook

    monkeypatch.setattr(own_hook, 'LEAST_ENTROPY', 1.0)
    longer = run.replace(total_environment_frames=4000)
    assert training.train(longer).endswith('ckpt-2')
    assert metrics_of(tmp_path)[-1]['frames'] == 420


@pytest.mark.parametrize(
    ('changes', 'error', 'sentence'),
    [
        ({'torso': 'no_such_module:Torso'}, ConfigError, "module 'no_such_module' cannot be found"),
        ({'torso': 'own_torso:Missing'}, ConfigError, "module 'own_torso' has no 'Missing'"),
        (
            {'torso': 'own_torso:VisionTransformer'},
            ConfigError,
            r'fails with observations of float32 \[2\]: .* must have rank 4',
        ),
        ({'core': 'own_core:Missing'}, ConfigError, "--core=own_core:Missing: .* has no 'Missing'"),
        ({'core': 'math:sqrt'}, ConfigError, '--core=math:sqrt cannot be made: TypeError'),
        ({'core': 'sonnet:LSTM'}, ConfigError, '--core=sonnet:LSTM cannot be made: TypeError'),
        ({'loss': 'own_loss:missing'}, ConfigError, "--loss=own_loss:missing: .* has no 'missing'"),
        ({'loss': 'math:sqrt'}, TrainingError, '--loss=math:sqrt fails: TypeError'),
        ({'loss': 'builtins:print'}, TrainingError, '--loss=builtins:print returns NoneType'),
        ({'hooks': ('own_hook:Missing',)}, ConfigError, '--hooks=own_hook:Missing: .* has no'),
        ({'hooks': ('math:sqrt',)}, ConfigError, '--hooks=math:sqrt cannot be made: TypeError'),
        ({'hooks': ('builtins:dict',)}, ConfigError, '--hooks=builtins:dict makes dict'),
    ],
)
def test_mistakes_in_own_code_are_one_sentence(tmp_path, changes, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        training.train(config(tmp_path, **changes))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'changes', [{'torso': 'own'}, {'core': 'own'}, {'loss': ':x'}, {'hooks': ('a.b',)}]
)
def test_names_without_a_module_are_refused(tmp_path, changes):
    with pytest.raises(ConfigError, match='my_module:'):
        config(tmp_path, **changes)
