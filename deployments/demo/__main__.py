"""`python -m deployments.demo`, which is `make demo`."""

import os
import sys

from ..checkout import prepare

if __name__ == "__main__":
    # Whatever `.env` says, which names the server of `make serve`, running or not: a temporary one does.
    os.environ.setdefault("PREFECT_API_URL", "")
    prepare()
    from .demonstration import main

    sys.exit(main())
