"""The process that flow runs are forked from: apart from whoever serves them, with all that they need imported."""

import gc
import os

# A signal to the group of the process that serves, as Ctrl-C is, reaches that one alone.
os.setsid()

from . import definitions, executing  # noqa: E402, F401 (they import all flows, and connect to nothing)

# What is imported stays: no flow run's collector need look at it again.
gc.collect()
gc.freeze()
