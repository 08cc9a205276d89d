"""The cache: a folder of all that is fetched or derived. What is in it is whole, or it is made again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path

from filelock import FileLock, Timeout

from study.data.downloads import Pin, Unavailable, digest, one_line, problem, say


def cache_dir() -> Path:
    """Folder of all that is fetched or derived: TTSI_CACHE, XDG_CACHE_HOME/ttsi or ~/.cache/ttsi."""
    own, above = os.environ.get("TTSI_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(own or Path(above, "ttsi")).expanduser().absolute()
    except RuntimeError:
        raise Unavailable("no home folder to keep files in: set TTSI_CACHE to a folder") from None


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raise Unavailable when a disk lacks `needed` bytes, before anything is written."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Unavailable(
            f"{what} needs {needed / 1e9:.2f} GB in {folder}, but {free / 1e9:.2f} GB are free: "
            "make room or set TTSI_CACHE to a folder on another disk"
        )


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path` for one process at a time. The kernel lets go of it when its holder dies."""
    held = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(blocking=False)
        except Timeout:
            say(f"waiting for another process that fetches {path.name}")
            held.acquire()
    except OSError as error:
        raise Unavailable(
            f"the cache can't be written ({one_line(error)}): set TTSI_CACHE to a folder that can"
        ) from error
    try:
        yield
    finally:
        held.release()


def damage(folder: Path, source: str) -> str | None:
    """What is wrong with a folder that was `built`; None = it is from this source, as its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        pins = [Pin(**entry) for entry in manifest["files"]]
        found = {path.name for path in folder.iterdir()} - {"manifest.json"}
        if manifest["source"] != source or found != {pin.name for pin in pins}:
            return f"{folder} is not what its manifest says"
        return next(filter(None, (problem(folder / pin.name, pin) for pin in pins)), None)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder} is incomplete"


def built(folder: Path, source: str, build: Callable[[Path], None]) -> Path:
    """`folder`, whole and from this source; what isn't is removed and built again, once for all processes.

    `build` fills an empty folder. Its manifest comes last and names the source; then the folder its name.
    """
    if not damage(folder, source):  # before locking too, because a complete cache may be read-only
        return folder
    with lock(cache_dir() / "locks" / folder.name):
        if wrong := damage(folder, source):
            if folder.exists():
                say(f"{wrong}: removed, built again from its source")
                shutil.rmtree(folder)
            new = folder.with_name(f".{folder.name}.new")
            shutil.rmtree(new, ignore_errors=True)  # what a killed run left
            new.mkdir(parents=True)
            try:
                build(new)
                files = [
                    {"name": p.name, "size": p.stat().st_size, "sha256": digest(p)} for p in new.iterdir()
                ]
                versions = {
                    p: metadata.version(p) for p in ("torch", "transformers", "gguf") if util.find_spec(p)
                }
                packages = filter(util.find_spec, ("torch", "transformers", "gguf"))
                versions = {package: metadata.version(package) for package in packages}
                files = [
                    {"name": path.name, "size": path.stat().st_size, "sha256": digest(path)}
                    for path in new.iterdir()
                ]
                manifest = {"source": source, "made_with": versions, "files": files}
                (new / "manifest.json").write_text(json.dumps(manifest, indent=2))
                new.rename(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    return folder
