"""The environments behind `environments.create_environment`. No TensorFlow here."""

from impala.environments.create import create_environment
from impala.environments.environment import (
    DeclarationError,
    Environment,
    EnvironmentConfig,
    Observation,
)
from impala.environments.instructions import INSTRUCTION_LENGTH, hash_instruction
from impala.errors import LevelError

__all__ = [
    'INSTRUCTION_LENGTH',
    'DeclarationError',
    'Environment',
    'EnvironmentConfig',
    'LevelError',
    'Observation',
    'create_environment',
    'hash_instruction',
]
