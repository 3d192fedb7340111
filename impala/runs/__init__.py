"""What a run writes to its folder and reports to its user: checkpoints, logs, flag files."""
