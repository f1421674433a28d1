"""`python -m se_fx` is `se-fx`."""

import sys

from se_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
