"""`python -m ftlib`: the same program as `tune`, whatever else is called that."""

import sys

from ftlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
