"""`python -m polarjax` is the console script."""

import sys

from polarjax.cli import main

sys.exit(main())
