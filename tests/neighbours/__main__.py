"""`python -m tests.neighbours`: a run per seed, two lines each; the exit code tells whether they kept apart.

TEST_POSTGRES_URL names a PostgreSQL server on which databases for the run may be made.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.neighbours", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=180, help="of load (default: %(default)s)")
    options = parser.parse_args()
    # What stops this process must not keep it from ending what it has started and removing its containers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.neighbours.settings"
    import django

    django.setup()
    from tests.settings import SCRATCH

    from .driver import Plan, run

    try:
        with tempfile.TemporaryDirectory(prefix="container-manager-neighbours-") as folder:
            violations = run(Plan(options.seed, options.seconds, os.environ["TEST_POSTGRES_URL"], Path(folder)))
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    for violation in violations:
        print(f"seed {options.seed}: {violation}", flush=True)
    print(f"{len(violations)} violations", flush=True)
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main())
