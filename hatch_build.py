"""Write the version of a build, which comes from the git tag, into its ``batchbench/version.py``,
and put the pages of the documentation beside the package, where ``batchbench help`` finds them.

The file of the checkout stays as it is: what git says there changes with each commit.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILE = "batchbench/version.py"


class BuildHook(BuildHookInterface):
    """Replace the number in ``version.py``, and add pages, in a wheel or source distribution."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Hand these files to the builder; an editable install needs none."""
        if version == "editable":
            return
        text = Path(self.root, FILE).read_text("utf-8")
        line = f'__version__ = "{self.metadata.version}"'
        text, count = re.subn(r"^__version__ = .*$", line, text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{FILE}: has {count} lines of __version__, not 1")
        self._folder = tempfile.TemporaryDirectory()  # removed with this hook
        changed = Path(self._folder.name, "version.py")
        changed.write_text(text, "utf-8")
        build_data["force_include"][str(changed)] = FILE
        folder = "batchbench/docs" if self.target_name == "wheel" else "docs"
        for page in Path(self.root, "docs").glob("*.md"):
            build_data["force_include"][str(page)] = f"{folder}/{page.name}"
