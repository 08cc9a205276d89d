"""Keys stay where they are: nothing that a run leaves behind or says holds one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, SHORT
from ledger import Row

KEYS = {
    "OPENAI_API_KEY": "sk-planted-0123456789abcdef",
    "HF_TOKEN": "hf_planted0123456789abcdef",
    "HUGGING_FACE_HUB_TOKEN": "hf_planted1123456789abcdef",
    "TTSI_API_KEY": "planted-2123456789abcdef",
    "ANTHROPIC_API_KEY": "sk-ant-planted-3123456789",
}
PASSWORD = "planted-swordfish"


def holders(folder: Path, secrets: list[str]) -> list[str]:
    """The files under a folder that hold one of the secrets."""
    wanted = re.compile(b"|".join(re.escape(s.encode()) for s in secrets))
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert files
    return [str(p) for p in files if wanted.search(p.read_bytes())]


def test_a_planted_key_is_nowhere_afterwards(
    tmp_path: Path, environment: dict[str, str], ledger: Callable[..., Row]
) -> None:
    row = ledger(
        f"{len(KEYS)} keys and a proxy's password around runs that succeed, fail and find no network",
        "none in the store, notebooks, tables, figures, logs, caches, temporary files or error texts",
    )
    scratch, secrets = tmp_path / "tmp", [*KEYS.values(), PASSWORD]
    scratch.mkdir()
    environment |= KEYS | {"HOME": str(tmp_path / "home"), "TMPDIR": str(scratch)}
    nowhere = f"http://user:{PASSWORD}@127.0.0.1:9"
    network = {"HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere, "PIP_INDEX_URL": f"{nowhere}/simple"}
    network |= {"HF_ENDPOINT": nowhere, "TTSI_CACHE": str(tmp_path / "cache"), "TTSI_DATA": str(tmp_path)}
    notebook = [sys.executable, "-m", "study.notebooks", "run", "02", "--profile"]
    runs = [
        (0, [*notebook, "smoke", *SHORT], {}),
        (1, [*notebook, "smoke", *SHORT], {"TTSI_FIGURES": f"{os.devnull}/figures"}),
        (2, [*notebook, "smoke", "arms=['no-such-arm']"], {"TTSI_RUNS": str(tmp_path / "failed")}),
        (1, [sys.executable, "-m", "study.notebooks", "reproduce", "--profile", "full"], network),
        (
            1,
            [sys.executable, "-m", "study.data.sources", "fetch", "smollm2-135m", "bfcl", "sealtool"],
            network,
        ),
    ]
    for number, (code, command, more) in enumerate(runs):
        done = subprocess.run(command, cwd=ROOT, env=environment | more, capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-2000:]
        (tmp_path / f"said-{number}.txt").write_text(done.stdout + done.stderr)
        row.tries += 1
    made = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {".sqlite", ".ipynb", ".csv", ".md", ".txt"} <= {p.suffix for p in made}
    assert holders(tmp_path, secrets) == []
    # The search finds what it looks for.
    (tmp_path / "planted").write_bytes(os.urandom(99) + KEYS["HF_TOKEN"].encode())
    assert holders(tmp_path, secrets) == [str(tmp_path / "planted")]
    row.seen = f"none in the {len(made)} files they left, which hold all they said"
