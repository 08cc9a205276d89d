"""The site's pages out of what is committed: figures, records, notebooks with their outputs, documents."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import jinja2
import mistune
import nbformat
from markupsafe import Markup, escape
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from study.site import front, records

ROOT = Path(__file__).resolve().parent.parent.parent
_COPIED = {".png", ".pdf", ".csv", ".svg"}
_STATIC = ("style.css", "explore.js")


def build(to: Path, root: Path = ROOT) -> list[Path]:
    """The pages written into a folder: `index.html` and all that it leads to, to be opened from disk.

    root: the checkout. Nothing is fetched, neither here nor by the pages; what lies in the folder already
    stays unless a page has its name.
    """
    return Site(to, root).write()


def folders(root: Path) -> list[Path]:
    """The folders of figures that are told of: those of committed runs, and that of the bench."""
    # Figures of a run that was not exported are a trial's.
    runs = sorted(path.parent.name for path in root.glob("results/*/header.json"))
    return [root / "figures", *(root / "figures" / run for run in runs)]


class Site:
    """Pages that link to each other; what a page links to in the checkout becomes a page or a copy of it."""

    def __init__(self, to: Path, root: Path) -> None:
        self.to, self.root = to.resolve(), root.resolve()
        self.wanted: list[Path] = []  # files of the checkout that a page links to, in the order met
        self.templates = jinja2.Environment(
            loader=jinja2.PackageLoader("study.site"), autoescape=True, undefined=jinja2.StrictUndefined
        )
        self.pages: list[Path] = []

    def write(self) -> list[Path]:
        """Every page, written."""
        self.to.mkdir(parents=True, exist_ok=True)
        for name in _STATIC:
            text = self.templates.loader.get_source(self.templates, name)[0]  # type: ignore[union-attr]
            (self.to / name).write_text(text + (_highlighting() if name == "style.css" else ""))
        self._front()
        # `<` may not stand in a script element: the name of a model could close it.
        values = json.dumps(records.data(self.root / "results"), allow_nan=False).replace("<", "\\u003c")
        self._page("explore.html", "Move the threshold", "explore.html", data=Markup(values))
        for source in self.wanted:  # grows while pages are made
            name = self._name(source)
            if source.suffix in _COPIED:
                (self.to / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, self.to / name)
            else:
                self._page(name, _title(source), body=Markup(self._body(source)))
        return self.pages

    def _page(self, name: str, title: str, template: str = "page.html", **values: object) -> None:
        path = self.to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * name.count("/")
        path.write_text(self.templates.get_template(template).render(title=title, up=up, **values))
        self.pages.append(path)

    def _front(self) -> None:
        notebooks = sorted((self.root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
        number = {path.name[:2]: path for path in notebooks}
        figures, questions = self.root / "figures", list[dict[str, object]]()
        for told in front.tell(folders(self.root)):
            asked, links = told.asked, []
            if (notebook := number.get(asked.notebook)) is not None:
                links.append((f"Notebook {asked.notebook}", self._link(notebook)))
            picture = told.folder and asked.picture and told.folder / f"{asked.picture}.png"
            table = told.folder and told.folder / f"{asked.table}.md"
            links += [("Table", self._link(table))] if table and table.exists() else []
            shown = self._link(picture) if picture and picture.exists() else ""
            said = told.sentence.splitlines()
            questions.append({
                "asks": asked.asks, "sentences": said, "intervals": told.intervals, "links": links,
                "run": told.folder.name if told.folder and told.folder != figures else "",
                "picture": shown, "alt": f"Figure to the question “{asked.asks}”: {said[0]}",
            })  # fmt: skip
        docs = [self.root / "README.md", *sorted((self.root / "docs").glob("*.md"))]
        self._page(
            "index.html", "Self-improvement at test time, measured", "front.html",
            lead="An open implementation and study of TT-SI. Every number on this page is read from the "
            "committed tables of the run that is named beside it; brackets are 95 % intervals.",
            questions=questions,
            notebooks=[(_title(path), self._link(path)) for path in notebooks],
            docs=[(_title(path), self._link(path)) for path in docs],
        )  # fmt: skip

    def _body(self, source: Path) -> str:
        """What a page shows of a file."""
        if source.suffix == ".ipynb":
            exporter = HTMLExporter(  # type: ignore[no-untyped-call]
                template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True
            )
            return str(exporter.from_notebook_node(nbformat.read(source, 4))[0])  # type: ignore[no-untyped-call]
        text = source.read_text()
        if source.suffix != ".md":
            return f"<h1>{escape(self._relative(source))}</h1>\n<pre>{escape(text)}</pre>"
        markdown = mistune.create_markdown(renderer=_Rendered(self, source), plugins=["table"])
        title = "" if text.startswith("# ") else f"<h1>{escape(_title(source))}</h1>\n"
        return title + str(markdown(text))

    def href(self, url: str, source: Path) -> str:
        """The address that takes a link's place on the page of a file; empty for what isn't in the site."""
        parts = urlsplit(url)
        if parts.scheme or parts.netloc:
            return url if parts.scheme in ("http", "https", "mailto") else ""
        target = (source.parent / unquote(parts.path)).resolve() if parts.path else source
        if not target.is_file() or self.root not in target.parents:
            return ""
        here = Path(self._name(source)).parent
        end = f"#{parts.fragment}" if parts.fragment else ""
        return quote(os.path.relpath(self._link(target, plain=True), here)) + end

    def _link(self, target: Path, plain: bool = False) -> str:
        """The address, from the front page, of what will show a file; from now on it is part of the site."""
        if target not in self.wanted:
            self.wanted.append(target)
        return self._name(target) if plain else quote(self._name(target))

    def _name(self, source: Path) -> str:
        name = self._relative(source)
        if source.suffix in _COPIED:
            return name
        return str(Path(name).with_suffix(".html")) if source.suffix in (".md", ".ipynb") else f"{name}.html"

    def _relative(self, source: Path) -> str:
        return source.relative_to(self.root).as_posix()


class _Rendered(mistune.HTMLRenderer):
    """Markdown as HTML: raw HTML is shown, not obeyed, comments are dropped, links lead into the site."""

    def __init__(self, site: Site, source: Path) -> None:
        super().__init__(escape=True)
        self.site, self.source = site, source

    def link(self, text: str, url: str, title: str | None = None) -> str:
        href = self.site.href(url, self.source)
        return f'<a href="{escape(href)}">{text}</a>' if href else text

    def image(self, text: str, url: str, title: str | None = None) -> str:
        href = self.site.href(url, self.source)
        return f'<img src="{escape(href)}" alt="{text}">' if href and not urlsplit(href).scheme else text

    def block_html(self, html: str) -> str:
        return "" if html.strip().startswith("<!--") else super().block_html(html)


def _title(source: Path) -> str:
    """A document's first heading; its name and folder if it has none."""
    return next(_headings(source), f"{source.stem}, {source.parent.name}")


def _headings(source: Path) -> Iterator[str]:
    if source.suffix == ".ipynb":
        cells = nbformat.read(source, 4).cells  # type: ignore[no-untyped-call]
        text = "\n".join(c["source"] for c in cells if c["cell_type"] == "markdown")
    else:
        text = source.read_text() if source.suffix == ".md" else ""
    return (line[2:].strip() for line in text.splitlines() if line.startswith("# "))


def _highlighting() -> str:
    light, dark = (
        HtmlFormatter(style=s, nobackground=True).get_style_defs(".highlight")
        for s in ("default", "github-dark")
    )
    return f"\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
