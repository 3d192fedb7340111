"""Random inputs for the command; see `runner`."""
