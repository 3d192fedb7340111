"""IMPALA: the agent, the learner, the actors, and what carries trajectories between them.

Espeholt et al. 2018, https://arxiv.org/abs/1802.01561
"""
