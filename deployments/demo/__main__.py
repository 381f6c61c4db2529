"""`python -m deployments.demo`, which is `make demo`."""

import os
import sys

from ..checkout import prepare

if __name__ == "__main__":
    # Ignore the server of `make serve` in `.env`, which may not be running: use a temporary one.
    os.environ.setdefault("PREFECT_API_URL", "")
    prepare()
    from .demonstration import main

    sys.exit(main())
