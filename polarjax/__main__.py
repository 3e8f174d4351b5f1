"""`python -m polarjax` is the console script."""

import os
import sys

# Python has put the folder that it is called from before all others: a `benchmarks` or
# `convert` of the user's would be imported in the place of ours. Only where polarjax
# itself lies, as in a clone of its repository, that folder is the right one.
_HERE, _HOME = os.getcwd(), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not sys.flags.safe_path and os.path.realpath(_HERE) != os.path.realpath(_HOME):
    sys.path[:1] = [path for path in sys.path[:1] if path not in ("", _HERE)]

try:
    from polarjax.cli.main import main
except KeyboardInterrupt:  # as `main` ends from here on
    os.write(2, b"interrupted\n")
    os._exit(130)

if __name__ == "__main__":
    sys.exit(main())
