"""The one exception that a person is meant to read."""


class LinearizeError(ValueError):
    """Something given from outside is wrong: its message names what was given and what would be valid.

    The command line prints the message on one line and exits with 2; nothing has been written.
    """


def unknown(kind: str, given: object, valid: object, *others: str) -> LinearizeError:
    """An error for a name that is not among the `valid` ones (any iterable of names); `others` say what else is."""
    names = ", ".join([*sorted(str(v) for v in valid), *others])  # type: ignore[attr-defined]
    return LinearizeError(f"unknown {kind} {given!r}; valid: {names}")
