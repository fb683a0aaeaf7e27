"""`python -m fmda` is the command `fmda`."""

from fmda.cli import main

if __name__ == "__main__":
    main()
