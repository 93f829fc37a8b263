"""The command line, with a pause before each step of a recovery.

Arguments: the pause in seconds, and those of the command line.
"""

import sys
import time
from typing import Any

from clipkernels.cli import main
from clipkernels.learn.recovery import training

if __name__ == "__main__":
    pause, step = float(sys.argv.pop(1)), training._step

    def step_slowly(*arguments: Any) -> float:
        time.sleep(pause)
        return step(*arguments)

    training._step = step_slowly
    main()
