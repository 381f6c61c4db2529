"""A queue and what befalls it, as a Hypothesis machine drives it: workers that can be stopped at any of their steps.

Only one worker moves at a time, and what it does depends on nothing but what it was told; so a failure can be had
again, and be made smaller.
"""

from .clock import let_time_pass
from .history import History
from .workers import STEPS, Fault, Kind, Worker

__all__ = ["STEPS", "Fault", "History", "Kind", "Worker", "let_time_pass"]
