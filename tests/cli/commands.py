"""Commands of the command line, run in this process, and the lines that they leave."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from clipkernels.cli import main
from clipkernels.cli.parts.demo_images import QUICK, draw, save


def run(*arguments: object) -> Result:
    """The result of a command."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    """The result of a command, whose exit status is 0."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def error(result: Result, status: int = 2) -> str:
    """The one line that a failed command leaves on stderr."""
    line = error_after_warnings(result, status)
    assert result.stderr == f"{line}\n"
    return line


def error_after_warnings(result: Result, status: int = 2) -> str:
    """The last line of a failed command's stderr; the lines before it are warnings."""
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    *before, line = result.stderr.splitlines()
    assert line.startswith("error: ") and all(other.startswith("warning: ") for other in before)
    return line


def error_after_notes(result: Result, status: int = 2) -> str:
    """The last line of a failed command's stderr; the lines before it are notes about the bundled model."""
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    *before, line = result.stderr.splitlines()
    assert line.startswith("error: ") and all(other.startswith("note: ") for other in before)
    return line


def save_a_digit_per_class(folder: Path) -> Path:
    """Write ten of the quick demo's digits, a folder per class, and return the folder of these folders."""
    save({"digits": draw(QUICK, seed=0)["digits"]}, folder)
    for kind in (folder / "digits").iterdir():
        for path in sorted(kind.iterdir())[1:]:
            path.unlink()
    return folder / "digits"
