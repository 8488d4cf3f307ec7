"""The errors that batchbench raises, and their exit codes.

    BatchbenchError            70   a fault of ours, as is any other exception
    ├── UsageError              2   the question is bad: an option, a file, a batch too large
    │   └── OutputError         2   standard output cannot be written
    ├── ClosedPipe            141   nobody reads standard output any more
    ├── OutOfTimeError         70   --max-time is up; caught, and what is finished is kept
    └── Interrupted           130   Ctrl-C; 143 for SIGTERM, 129 for SIGHUP

``str(error)`` is one line that names the option or the file and says what would be right.
A bad answer is no exception: a run whose outputs are wrong is written and shown as any other, and
ends with 1.
"""

LONGEST_VALUE = 80
"""Characters of a value that a message shows."""

_LONGEST_WORD, _LONGEST_LINE = 255, 2000
"""Characters of a word, such as the name of a file, and of a whole message."""


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


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _cut(text: str, most: int) -> str:
    """Return the text, without its middle if it is too long."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


class BatchbenchError(Exception):
    """Root of all errors that batchbench raises on purpose."""

    exit_code = 70

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(BatchbenchError):
    """What was asked cannot be done; the message says what to type instead."""

    exit_code = 2


class OutputError(UsageError):
    """Standard output is closed, or its disk is full."""


class ClosedPipe(BatchbenchError):  # noqa: N818  # the reader has what it wanted
    """The reader of standard output has gone, as ``head -1`` does; the program ends quietly."""

    exit_code = 141


class OutOfTimeError(BatchbenchError):
    """The time that the user allowed is up before some work is finished.

    ``waited_s`` is the time spent waiting for an answer.
    """

    def __init__(self, why: str, waited_s: float = 0.0) -> None:
        super().__init__(why)
        self.waited_s = waited_s


class Interrupted(BatchbenchError):  # noqa: N818  # it is none
    """Ctrl-C, SIGTERM or SIGHUP; the message says what was kept."""

    exit_code = 130
