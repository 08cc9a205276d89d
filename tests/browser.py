"""A page in a real headless Chromium, over its debugging protocol: what it shows, what it complains of."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import websocket

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


class Page:
    """One tab. `complaints`: errors and warnings of the console, and what was asked of the network."""

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, timeout=60)
        self.number, self.complaints = 0, list[str]()
        self.loaded = False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            self._note(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _note(self, event: dict[str, Any]) -> None:
        what, said = event.get("method"), event.get("params", {})
        self.loaded |= what == "Page.loadEventFired"
        if what == "Runtime.exceptionThrown":
            self.complaints.append(
                said["exceptionDetails"].get("exception", {}).get("description", str(said))
            )
        elif what == "Log.entryAdded" or (what == "Runtime.consoleAPICalled" and said["type"] != "log"):
            self.complaints.append(str(said))
        elif what == "Network.requestWillBeSent":
            url = said["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:")):
                self.complaints.append(f"asks for {url}")

    def open(self, url: str) -> None:
        self.loaded = False
        self.send("Page.navigate", url=url)
        while not self.loaded:
            self._note(json.loads(self.socket.recv()))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key, as a hand would press it."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A tab without a network, for the time of a with block. folder: an empty one for its profile."""
    assert CHROMIUM
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--no-first-run", "--disable-background-networking",
                 "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0",
                 "--remote-allow-origins=*", f"--user-data-dir={folder}"]  # fmt: skip
    process = subprocess.Popen([CHROMIUM, *arguments, "about:blank"], stderr=subprocess.DEVNULL)
    try:
        ready, until = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (ready.exists() and ready.read_text().strip()):
            assert process.poll() is None and time.monotonic() < until, "Chromium did not start"
            time.sleep(0.1)
        port = ready.read_text().split()[0]
        tabs = json.load(urlopen(f"http://127.0.0.1:{port}/json"))
        yield Page(next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page"))
    finally:
        process.terminate()
        process.wait(20)
