"""Runs a sweep from the command line; see `impala.tools.sweep.sweep`."""

import sys

from impala.runs.output import outlive_readers
from impala.tools.sweep.sweep import main

if __name__ == '__main__':
    outlive_readers()
    sys.exit(main(sys.argv[1:]))
