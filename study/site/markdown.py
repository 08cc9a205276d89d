"""docs/results.md: the front page's questions and answers as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from study.site.front import Told


def results(told: Sequence[Told], root: Path) -> str:
    """The questions with their answers as Markdown for docs/: the picture first, then the sentence."""
    parts = [
        "# Results\n\nWritten by `make site` from the committed tables; brackets are 95 % intervals. What is "
        "confirmatory and what was found by looking: [hypotheses.md](hypotheses.md)."
    ]
    for t in told:
        links = [f"[notebook {t.asked.notebook}](../{p.relative_to(root)}){_outputs(p, t.folder)}"
                 for p in sorted(root.glob(f"notebooks/{t.asked.notebook}_*.ipynb"))]  # fmt: skip
        files = (
            [t.folder / f"{n}.{e}" for n, e in ((t.asked.picture, "png"), (t.asked.table, "md"))]
            if t.folder
            else []
        )
        shown = {p.suffix: f"../{p.relative_to(root).as_posix()}" for p in files if p.exists()}
        picture = [f"![{t.asked.asks}]({shown['.png']})"] if ".png" in shown else []
        links = ([f"[table]({shown['.md']})"] if ".md" in shown else []) + links
        run = [f"run `{t.folder.name}`"] if t.folder and t.folder.name != "figures" else []
        where = " · ".join([*run, *links])
        parts.append("\n\n".join([f"## {t.asked.asks}", *picture, _listed(t.sentence), where]))
    return "\n\n".join(parts) + "\n"


def _listed(sentence: str) -> str:
    """Markdown of it: a list where there are several lines."""
    lines = sentence.splitlines()
    return sentence if len(lines) < 2 else "\n".join(f"- {line}" for line in lines)


def _outputs(notebook: Path, folder: Path | None) -> str:
    """Which run a notebook carries the outputs of, where it isn't the one that is told of."""
    made = json.loads(notebook.read_text())["metadata"].get("ttsi", {}).get("profile", "")
    return f" (with the outputs of `{made}`)" if folder and made not in ("", folder.name) else ""
