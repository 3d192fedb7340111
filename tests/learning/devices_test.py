"""Tests of impala/learning/devices.py; several_learners_test uses its devices."""

import pytest
import tensorflow as tf

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


@pytest.mark.parametrize('name', ['/cpu:0', 'CPU:0', '/device:CPU:0'])
def test_the_device_of_the_policy_is_found_by_any_of_its_names(name):
    device = learner_devices.inference_device(name)
    with learner_devices.placed_on(device):
        assert tf.Variable(1.0).device.endswith('/device:CPU:0')
    assert learner_devices.inference_device('') is None


@pytest.mark.parametrize('name', ['/gpu:1', '/cpu:99', 'cpu', 'nonsense', '/'])
def test_an_unknown_device_of_the_policy_is_refused_with_the_devices_there_are(name):
    with pytest.raises(ConfigError) as error:
        learner_devices.inference_device(name)
    assert str(error.value) == (
        f'--inference_device={name} is not one of the devices that TensorFlow finds here: /cpu:0.'
    )
