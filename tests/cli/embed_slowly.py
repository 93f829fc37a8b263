"""The command line, with a pause before each batch of embeddings but the first, and a limit of the size of files.

Arguments: the pause in seconds, the limit in bytes or 0, and those of the command line.
"""

import resource
import sys
import time
from itertools import count
from typing import Any

from clipkernels.cli import main
from clipkernels.collection.encoder import Encoder

if __name__ == "__main__":
    pause, limit = float(sys.argv.pop(1)), int(sys.argv.pop(1))
    embed, batches = Encoder.embed, count()

    def embed_slowly(self: Encoder, images: Any) -> Any:
        time.sleep(pause if next(batches) else 0)
        return embed(self, images)

    Encoder.embed = embed_slowly  # type: ignore[method-assign]
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main()
