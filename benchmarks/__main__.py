"""Entry point of ``python -m benchmarks``."""

import signal
import sys

from .commands import main

if __name__ == "__main__":
    # A shell starts background jobs with interrupts ignored; here they end a run and keep its rows.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
