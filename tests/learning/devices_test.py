"""Tests of impala/learning/devices.py; several_learners_test uses its devices."""

import pytest

from impala.config import ConfigError
from impala.learning import devices as learner_devices


@pytest.mark.parametrize(
    ('devices', 'are_shared', 'sentence'),
    [
        (['gpu0'], False, "--learner_devices=gpu0: 'gpu0' is not a valid device, such as /gpu:0"),
        (['/cpu:0', ''], False, "'' is not a valid device"),
        (['/cpu:1', '/cpu:1'], False, 'several GPUs, or several CPUs, each once'),
        (['/cpu:0', '/gpu:0'], False, 'several GPUs, or several CPUs, each once'),
        (['/gpu:99'], False, r'there is no /gpu:99; TensorFlow finds \d+ GPUs'),
        (['/cpu:0', '/cpu:1'], True, 'with --learner_addresses, several devices must be GPUs'),
    ],
)
def test_invalid_devices_are_refused(devices, are_shared, sentence):
    with pytest.raises(ConfigError, match=sentence):
        learner_devices.prepare(devices, are_shared)
