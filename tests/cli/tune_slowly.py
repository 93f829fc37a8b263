"""The command line, with a pause before every forward of a tuning.

Arguments: the pause in seconds, and those of the command line.
"""

import sys
import time
from typing import Any

from clipkernels.cli import main
from clipkernels.tuning.forwards import Part

if __name__ == "__main__":
    pause = float(sys.argv.pop(1))
    embed = Part.embed

    def embed_slowly(self: Part, *arguments: Any) -> Any:
        time.sleep(pause)
        return embed(self, *arguments)

    Part.embed = embed_slowly  # type: ignore[method-assign]
    main()
