"""The command line, with a pause before every batch of an evaluation.

Arguments: the pause in seconds, and those of the command line.
"""

import sys
import time
from typing import Any

from clipkernels.cli import main
from clipkernels.evaluation import features

if __name__ == "__main__":
    pause = float(sys.argv.pop(1))
    encode_image = features.encode_image

    def encode_slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(pause)
        return encode_image(*arguments, **options)

    features.encode_image = encode_slowly
    features.PART = 16
    main()
