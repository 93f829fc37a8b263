"""The command line, with a pause before each step of a distillation, and a checkpoint after each.

Arguments: the pause in seconds, and those of the command line.
"""

import sys
import time
from typing import Any

from clipkernels import run_folder
from clipkernels.cli import main
from clipkernels.questions.learners import StudentLearner

if __name__ == "__main__":
    pause = float(sys.argv.pop(1))
    loss = StudentLearner.loss

    def lose_slowly(*arguments: Any) -> Any:
        time.sleep(pause)
        return loss(*arguments)

    StudentLearner.loss = lose_slowly  # type: ignore[method-assign]
    run_folder.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    main()
