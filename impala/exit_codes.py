"""Exit codes of the command line, by which schedulers and sweeps know what has happened."""

FAILURE = 1
BAD_INPUT = 2
LEARNER_LOST = 3  # An actor job whose learner did not come back.
UNROLLS_LOST = 4  # Training is done and saved, but most unrolls were lost to dying actors.
INTERRUPTED = 130
