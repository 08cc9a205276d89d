"""docs/your-own.md, section "Your model": its snippet, and a study with another family's model."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from conftest import Site
from families import FAMILIES
from test_sources import CONTENT, REPO, REVISION, World, pin, world  # noqa: F401

from study.data import sources
from study.run.study import Study

DOCS = Path(__file__).resolve().parent.parent / "docs" / "your-own.md"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    FAMILIES["gemma3"].build(folder)
    return folder


def test_the_snippet_runs_with_another_familys_model(
    gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = DOCS.read_text().split("## Your model")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "my-model").symlink_to(gemma)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    sure = names["answer"].likelihood  # type: ignore[attr-defined]
    assert 0 <= sure <= 1 and str(sure) in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["exact", "activated"])
def test_a_study_with_another_familys_model(
    gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path))
    few = {"arms": ["base", "tt_si"], "inference": ["direct"], "estimators": {}, "variants": {}}
    study = Study("smoke", n=3, model=str(gemma), mode=mode, answer_tokens=16, **few)
    study.run()
    records = study.records()
    assert sorted(records["arm"]) == ["base"] * 3 + ["tt_si"] * 3
    assert (records["status"] == "ok").all() and (records["source"] == "computed").all()
    assert records.loc[records["arm"] == "tt_si", "margin"].between(0, 1).all()
    assert records["reply"].str.startswith('<tool_call>[{"name": "').all()


def test_a_study_in_a_mode_that_the_template_cant_serve_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path / "runs"))
    FAMILIES["mistral_v1"].build(tmp_path / "mistral")
    study = Study("smoke", n=2, model=str(tmp_path / "mistral"), mode="activated")
    with pytest.raises(ValueError, match=r"^the model's chat template opens .*: use mode 'exact'$"):
        study.run(["base", "tt_si"])


# --- from the hub ---------------------------------------------------------------------------------------

NAME = f"{REPO}@{REVISION}"
API = f"/api/models/{REPO}/revision/{REVISION}?blobs=true"


def offer(site: Site, files: dict[str, bytes]) -> None:
    """Has the site list and serve a repository's files as the hub does."""
    listed = []
    for name, data in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": blob}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"sha256": pin(name, data).sha256, "size": len(data), "pointerSize": 134}
        listed.append(entry)
        site.files[f"/{REPO}/resolve/{REVISION}/{name}"] = data
    site.files[API] = json.dumps({"id": REPO, "sha": REVISION, "siblings": listed}).encode()


def test_a_hub_id_with_its_commit_is_a_model(world: World, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    files = {"config.json": b"{}", "model.safetensors": CONTENT, "chat_template.jinja": b"{{ messages }}"}
    offer(world.site, {**files, "pytorch_model.bin": b"a pickle", "original/params.json": b"{}"})
    assert sources.model_hash(NAME) == REVISION
    folder = sources.model_dir(NAME)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"} == files
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(world.site.requests)
    assert sources.model_dir(NAME) == folder and len(world.site.requests) == asked


def test_other_bytes_than_the_hub_lists_are_never_used(world: World) -> None:  # noqa: F811
    offer(world.site, {"config.json": b"{}", "model.safetensors": CONTENT})
    world.site.files[f"/{REPO}/resolve/{REVISION}/model.safetensors"] = CONTENT[::-1]
    with pytest.raises(sources.WrongBytes):
        sources.model_dir(NAME)


def test_what_is_no_model_is_said_in_one_line(world: World) -> None:  # noqa: F811
    offer(world.site, {"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    with pytest.raises(sources.Unavailable, match=r"^.*holds no \*\.safetensors.*no pickles\)$"):
        sources.model_dir(NAME)
    for name in (REPO, f"{REPO}@main"):
        with pytest.raises(sources.Unavailable, match=r"^no model .*or a hub id with its commit .*$"):
            sources.model_dir(name)


def test_gemma_is_named_with_its_licence_and_is_no_default() -> None:
    model = sources.MODELS["gemma3-270m"]
    assert "Gemma Terms of Use" in model.licence
    assert "gemma3-270m" not in sources.DEFAULT
    assert model.hash != model.files[0].sha256  # the template that it is given belongs to it
    root = DOCS.parent.parent
    assert not [p for p in (root / "profiles").glob("*.yaml") if "gemma" in p.read_text()]
