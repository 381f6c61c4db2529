"""`python -m deployments.demo`, which is `make demo`."""

import sys

from ..checkout import prepare

if __name__ == "__main__":
    prepare()
    from .demonstration import main

    sys.exit(main())
