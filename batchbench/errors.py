"""The errors that batchbench raises, and their exit codes.

    BatchbenchError            70   a bug, as is any other exception
    ├── UsageError              2   an invalid option or file, or a batch that is too large
    │   └── OutputError         2   standard output cannot be written
    ├── IncompleteError         1   machines were lost, so a part of the work is missing
    ├── ClosedPipe            141   the reader of standard output has gone
    ├── OutOfTimeError         70   --max-time is over; caught, and finished work is used
    └── Interrupted           130   Ctrl-C; 143 for SIGTERM, 129 for SIGHUP

``str(error)`` is one line that names the option or the file and says what to type instead. A run
with wrong outputs raises no exception: it is written and shown like any other, and ends with 1.
"""

LONGEST_VALUE = 80
"""Maximum number of characters of a value in a message."""

_LONGEST_WORD, _LONGEST_LINE = 255, 2000
"""Maximum number of characters of a word, such as a file name, and of a whole message."""


def shown(value: object, most: int = LONGEST_VALUE) -> str:
    """Return a value for a message: at most ``most`` characters, control characters escaped."""
    try:
        text = _escaped(str(value)[: most + 1])
    except ValueError:  # Python refuses to convert an integer of so many digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def one_line(message: str) -> str:
    """Return a message on one line, without control characters and of bounded length."""
    line = " ".join(_cut(_escaped(word), _LONGEST_WORD) for word in message.split())
    return _cut(line, _LONGEST_LINE)


LONGEST_REASON = 200
"""Maximum number of characters of another program's message."""


def reason_in_short(error: object) -> str:
    """Return the message of another program's error: one short line, never a stack trace."""
    return shown(one_line(str(error)), LONGEST_REASON)


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _cut(text: str, most: int) -> str:
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


class BatchbenchError(Exception):
    """The base class of all errors that batchbench raises on purpose."""

    exit_code = 70

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(BatchbenchError):
    """The request cannot be carried out; the message says what to type instead."""

    exit_code = 2


class OutputError(UsageError):
    """Standard output is closed, or its disk is full."""


class IncompleteError(BatchbenchError):
    """Machines were lost, and a part of the work with them; the rest is kept."""

    exit_code = 1


class ClosedPipe(BatchbenchError):  # noqa: N818  # not an error
    """The reader of standard output has gone, as ``head -1`` does; the program ends quietly."""

    exit_code = 141


class OutOfTimeError(BatchbenchError):
    """Work was not finished in the time that the user allowed; ``waited_s`` was spent waiting."""

    def __init__(self, why: str, waited_s: float = 0.0) -> None:
        super().__init__(why)
        self.waited_s = waited_s


class Interrupted(BatchbenchError):  # noqa: N818  # not an error
    """Ctrl-C, SIGTERM or SIGHUP; the message says what was saved."""

    exit_code = 130
