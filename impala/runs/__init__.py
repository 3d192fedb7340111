"""What a run leaves in its folder and tells its user: checkpoints, logs, flag files."""
