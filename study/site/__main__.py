"""Writes the site: `python -m study.site [folder]`, site/ unless told otherwise."""

from __future__ import annotations

import sys
from pathlib import Path

from study.site import front, markdown
from study.site.build import ROOT, build, folders

if __name__ == "__main__":
    (ROOT / "docs" / "results.md").write_text(markdown.results(front.tell(folders(ROOT)), ROOT))
    to = Path(sys.argv[1]) if sys.argv[1:] else ROOT / "site"
    print(f"{len(build(to))} pages; open {to / 'index.html'}")
