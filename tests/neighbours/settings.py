"""The standalone site, for the process that plays the people of both installations and watches them."""

from container_manager.settings import *  # noqa: F403
