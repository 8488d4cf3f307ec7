"""Kinds of files by their first bytes: the format of a trace, or the name of something else."""

from __future__ import annotations

import csv
import re

from batchbench.workloads.spec import TRACE_FORMATS
from batchbench.workloads.traces.documents import TURNS
from batchbench.workloads.traces.objects import first_element, is_document
from batchbench.workloads.traces.rows import shown
from batchbench.workloads.traces.tables import AZURE, BURSTGPT, columns_of, plain

HEAD_BYTES = 2**16
"""Number of bytes from which the kind of a file is found."""

_KEYS = (
    ("batchbench", ("batchbench_workload",)),
    ("sharegpt", TURNS[:1]),
    ("mooncake", ("input_length", "hash_ids", "text_input", "output_length")),
    ("batchbench", ("output_tokens", "prompt_ids", "prompt_tokens", "due_ns")),
    ("sharegpt", TURNS[1:]),
)
"""Keys that JSON of a format has, in the order in which they are looked for."""

_UNPACK = "unpack it and give the file that is in it"
_EXPORT = "save it as CSV, such as with pandas' to_csv"

_KINDS = (
    (rb"PK\x03\x04.*(?:\[Content_Types\]\.xml|xl/)", "a spreadsheet", "save it as CSV"),
    (rb"PK(?:\x03\x04|\x05\x06)", "a zip archive", _UNPACK),
    (
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "a spreadsheet or another Office file",
        "save it as CSV",
    ),
    (rb"PAR1", "a parquet file", _EXPORT),
    (rb"(?:ARROW1|FEA1)", "an Arrow file", _EXPORT),
    (rb"ORC", "an ORC file", _EXPORT),
    (rb"Obj\x01", "an Avro file", _EXPORT),
    (rb"\x89HDF\r\n", "an HDF5 file", _EXPORT),
    (rb"\x93NUMPY", "a NumPy array", _EXPORT),
    (rb"SQLite format 3\x00", "an SQLite database", "save its table as CSV"),
    (rb"\x80[\x02-\x05]", "a Python pickle", "save it as CSV or JSON"),
    (rb"%PDF-", "a PDF", "give the data themselves"),
    (rb"(?:\x89PNG|\xff\xd8\xff|GIF8)", "a picture", "give the data themselves"),
    (rb"version https://git-lfs\.github\.com/", "a Git LFS pointer", "fetch it with git lfs pull"),
    (rb"(?i)\s*<(?:!doctype html|html|head)", "an HTML page", "download the raw file"),
    (rb"\s*<(?:\?xml|[A-Za-z])", "XML", "save it as CSV or JSON"),
    (rb"GGUF", "a GGUF model", "give it with --model"),
    (rb"\x7fELF|MZ|#!", "a program", "give a file of data"),
    (rb"(?s:.{257})ustar", "a tar archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (rb"\x04\x22\x4d\x18", "an lz4 archive", _UNPACK),
    (rb"\x1f\x9d", "a compress (.Z) archive", _UNPACK),
    (rb"\x1f\x8b", "a gzip archive", _UNPACK),  # inside another archive
    (rb"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (rb"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (rb"BZh[1-9]1AY&SY", "a bzip2 archive", _UNPACK),
)

_TEXT = bytes({7, 8, 9, 10, 12, 13, 27, *range(0x20, 0x100)})


def format_of(head: bytes) -> str | None:
    """Return the format of a trace with this beginning; None if it has none."""
    begin = head.lstrip()
    if begin[:1] in (b"[", b"{"):
        for format, keys in _KEYS:
            if re.search(rb'"(?:%s)"\s*:' % "|".join(keys).encode(), begin):
                return format
        first = first_element(begin)
        return "sharegpt" if is_document(begin) and not isinstance(first, dict) else None
    line = begin.partition(b"\n")[0].decode("utf-8", "replace")
    try:
        _, names = columns_of(line)
    except (csv.Error, ValueError):
        return None
    for format, columns in (("azure", AZURE), ("burstgpt", BURSTGPT)):
        if all(plain(column) in names for column in columns[-2:]):
            return format
    return None


def is_hopeless(head: bytes) -> bool:
    """Return True for bytes that cannot be rows of any format."""
    return _kind_of(head) is not None


def described(head: bytes) -> str:
    """Return words for the kind of a file that is not a trace, and some advice."""
    if kind := _kind_of(head):
        return kind
    begin = head.lstrip()
    if begin.startswith((b"{", b"[")):
        keys = re.findall(rb'"([^"\\]{1,40})"\s*:', begin)
        names = [key.decode("utf-8", "replace") for key in dict.fromkeys(keys)]
        kind = f"JSON with the keys {', '.join(names[:5])}," if names else "JSON"
    else:
        first = begin.partition(b"\n")[0].decode("utf-8", "replace").strip()
        kind = f"text that begins with {shown(first)},"
    return (
        f"{kind} of no known format ({', '.join(TRACE_FORMATS)}); if it is one of them, name it "
        "with --trace-format"
    )


def _kind_of(head: bytes) -> str | None:
    """Return the kind of a file that cannot be a trace, and some advice; else None."""
    if not head.strip():
        return f"{'blank text' if head else 'an empty file'}; give a file with requests"
    for pattern, kind, advice in _KINDS:
        if re.match(pattern, head, re.DOTALL):
            return f"{kind}; {advice}"
    start = head[:200]
    if 0 in (start[::2].count(0), start[1::2].count(0)) and start.count(0) * 3 > len(start):
        return "UTF-16 text without a byte-order mark; save it as UTF-8"
    controls = len(head.translate(None, _TEXT))
    if controls * 20 > len(head):
        return "binary data of no known kind; give a file of text"
    return None
