"""Everything that can go wrong, and the exit code each of it ends with.

    BatchbenchError            70   a fault of ours, as is any other exception
    ├── UsageError              2   the question is bad: an option, a file, a batch too large
    └── Interrupted           130   Ctrl-C, with nothing to keep

``str(error)`` is one line that names the option or the file and says what would be right.
A bad answer is no exception: a run whose outputs are wrong is written and shown as any other, and
ends with 1.
"""


class BatchbenchError(Exception):
    """Root of all errors that batchbench raises on purpose."""

    exit_code = 70

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class UsageError(BatchbenchError):
    """What was asked cannot be done; the message says what to type instead."""

    exit_code = 2


class Interrupted(BatchbenchError):  # noqa: N818  # it is none
    """Ctrl-C before anything was finished that could be kept."""

    exit_code = 130
