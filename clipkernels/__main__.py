"""`python -m clipkernels`, the same as `clipkernels`."""

from clipkernels.cli import main

if __name__ == "__main__":
    main(prog_name="clipkernels")
