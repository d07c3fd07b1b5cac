"""The one error type of the data tools."""


class DataError(ValueError):
    """Input that cannot be used; the message says where it is, what it was and what it must be."""
