"""`python -m clipjax.cli`, where the `clipjax` script is not on the path."""

import sys

from clipjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
