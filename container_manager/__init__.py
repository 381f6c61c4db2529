"""Runs container jobs from a database queue on Docker Engines."""
