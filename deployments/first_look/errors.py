"""What keeps a first look from starting."""


class CannotStart(Exception):
    """The message is one line that says what to do."""
