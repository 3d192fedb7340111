"""Programs that work on finished or running runs: plot, export, sweep."""
