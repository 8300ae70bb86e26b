"""`python -m kernelize.cli` is `kernelize`; `accelerate launch -m kernelize.cli` needs it."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
