"""`python -m clipkernels.runtime FOLDER photo.jpg`, and `python FOLDER/runtime photo.jpg` in an exported folder."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
if not __package__:  # python FOLDER/runtime
    sys.path[0] = str(HERE.parent)

from clipkernels.runtime.command import main  # noqa: E402
from clipkernels.runtime.manifest import is_export  # noqa: E402

main(HERE.parent if is_export(HERE.parent) else None)
