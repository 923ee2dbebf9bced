"""`python -m hfac`: the same command line as the `hfac` console script."""

import sys

from hfac.cli import main

if __name__ == "__main__":
    sys.exit(main())
