"""``python -m corollary`` is the command ``corollary``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
