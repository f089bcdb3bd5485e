"""`python -m linearize`, as the command `linearize`; `torchrun -m linearize` in several processes."""

import sys

from linearize.cli import main

if __name__ == "__main__":
    sys.exit(main())
