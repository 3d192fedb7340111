"""Test mode, and its report."""

from impala.evaluation.report import SCORES_FILE
from impala.evaluation.test_mode import EvaluationInterrupted, evaluate

__all__ = ['SCORES_FILE', 'EvaluationInterrupted', 'evaluate']
