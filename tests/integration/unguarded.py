"""A flow whose process SIGTERM ends at once, as it ends ours before their bodies and after them."""

import time

from prefect import flow


@flow
def unguarded() -> None:
    time.sleep(600)
