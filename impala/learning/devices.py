"""The devices that a learner trains on, and that the behaviour policy acts on."""

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from impala.config import ConfigError


def prepare(devices: Sequence[str], are_shared_with_others: bool) -> None:
    """Configures TensorFlow to have these devices and, without other learners, starts it.

    Must be called before TensorFlow starts. CPUs beyond the first are parts of the same processor,
    for trying things out.

    Args:
      devices: names as `/gpu:0`; none leaves the choice to TensorFlow.
      are_shared_with_others: whether there are other learners. Their strategy takes all devices
        that TensorFlow sees, and must be made before TensorFlow starts.

    Raises:
      ConfigError: there are no such devices, or they cannot be used together.
    """
    flag = f'--learner_devices={",".join(devices)}'
    matches = [re.fullmatch(r'/(cpu|gpu):(\d{1,3})', device) for device in devices]
    for device, match in zip(devices, matches, strict=True):
        if match is None:
            raise ConfigError(
                f'{flag}: {device!r} is not a valid device, such as /gpu:0 or /cpu:0.'
            )
    kinds = {match[1].upper() for match in matches if match}
    indices = [int(match[2]) for match in matches if match]
    if len(kinds) > 1 or len(set(indices)) < len(indices):
        raise ConfigError(f'{flag} must be several GPUs, or several CPUs, each once.')
    if kinds == {'GPU'}:
        gpus = tf.config.list_physical_devices('GPU')
        for device, index in zip(devices, indices, strict=True):
            if index >= len(gpus):
                raise ConfigError(
                    f'{flag}: there is no {device}; TensorFlow finds {len(gpus)} GPUs.'
                )
        if are_shared_with_others:
            tf.config.set_visible_devices([gpus[index] for index in indices], 'GPU')
    elif kinds == {'CPU'}:
        if are_shared_with_others and indices != [0]:
            raise ConfigError(f'{flag}: with --learner_addresses, several devices must be GPUs.')
        if are_shared_with_others:
            tf.config.set_visible_devices([], 'GPU')
        (cpu,) = tf.config.list_physical_devices('CPU')
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * (max(indices) + 1)
        )
    if not are_shared_with_others:
        tf.config.list_logical_devices()


def strategy_of_devices(devices: Sequence[str]) -> tf.distribute.Strategy:
    """Returns a strategy with a replica on each of these devices of this machine.

    Args:
      devices: names as `/gpu:0`.
    """
    return tf.distribute.MirroredStrategy(list(devices))


def inference_device(name: str) -> str | None:
    """Returns the device of `--inference_device`, as TensorFlow names it; starts TensorFlow.

    Args:
      name: as `/gpu:1`, `GPU:1` or `/device:GPU:1`; empty for the default.

    Returns:
      None for the default, the first GPU or the CPU.

    Raises:
      ConfigError: there is no such device.
    """
    if not name:
        return None
    there = {_short(device.name): device.name for device in tf.config.list_logical_devices()}
    if _short(name) not in there:
        raise ConfigError(
            f'--inference_device={name} is not one of the devices that TensorFlow finds here: '
            f'{", ".join(there)}.'
        )
    return there[_short(name)]


def placed_on(device: str | None) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which variables and operations are on a device; None for any."""
    return contextlib.nullcontext() if device is None else tf.device(device)


def _short(name: str) -> str:
    """Returns the name of a device in the form `/gpu:1`."""
    return '/' + name.lower().removeprefix('/').removeprefix('device:')
