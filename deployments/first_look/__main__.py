"""`python -m deployments.first_look`, which is `make serve`."""

import sys

from ..checkout import prepare

if __name__ == "__main__":
    prepare()
    from .services import main

    sys.exit(main())
