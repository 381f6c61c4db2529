"""What workers are forked from: everything is imported, nothing connected. So a new life takes milliseconds."""

from importlib import import_module

import django

django.setup()
import_module("tests.fuzz.worker")
