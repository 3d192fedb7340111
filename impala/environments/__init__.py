"""Environments: level name -> environment, behind one small interface.

Actor processes import this package, and there are many of them. So it never imports TensorFlow, and
imports Gymnasium and other packages only when a level needs them.
"""

from impala.config import EnvironmentConfig
from impala.environments.create import create_environment
from impala.environments.environment import DeclarationError, Environment, Observation
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
