"""`python -m clipkernels.runtime FOLDER photo.jpg`, and `python FOLDER/runtime photo.jpg` in an exported folder."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
if not __package__:  # python FOLDER/runtime
    sys.path[0] = str(HERE.parent)

try:
    from clipkernels.runtime.command import main
    from clipkernels.runtime.manifest import is_export
except ModuleNotFoundError as error:
    file = HERE.parent / "requirements.txt"
    remedy = f"pip install -r {file}" if file.is_file() else f"pip install {error.name}"
    print(f"error: expected {error.name} to be installed, got: {error} ({remedy})", file=sys.stderr)
    raise SystemExit(2) from None

main(HERE.parent if is_export(HERE.parent) else None)
