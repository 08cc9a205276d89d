"""Profiles that can't be read: one line that names file and place, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from study import notebooks
from study.run.arms import UNCERTAIN, Arm
from study.run.config import load_profile

GOOD = "model: tiny\nbenchmarks: {fixture: 4}\n"
BROKEN = {
    "empty": (b"", "is empty"),
    "comments only": (b"# nothing\n", "is empty"),
    "broken": (b"model: [tiny\nbenchmarks: {fixture: 4}\n", "line 2"),
    "a tab": (b"model:\ttiny\n\tbenchmarks: x\n", "line"),
    "given twice": (GOOD.encode() + b"model: other\n", "'model' is given twice"),
    "given twice inside": (b"model: tiny\nbenchmarks: {fixture: 4, fixture: 5}\n", "'fixture' is given twice"),
    "a list": (b"- tiny\n", "holds no keys"),
    "a word": (b"tiny\n", "holds no keys"),
    "no text": (b"\xff\xfe\x00", "own.yaml"),
    "a misspelt key": (GOOD.encode() + b"epoch: 3\n", "did you mean 'epochs'"),
    "an unknown key": (GOOD.encode() + b"zzz: 3\n", "no key 'zzz'; there are name, model"),
    "a wrong value": (GOOD.encode() + b"tau: 1.5\n", "tau: Input should be less than"),
    "a wrong choice": (GOOD.encode() + b"judge: strict\n", "judge: Input should be 'schema', 'string' or 'bfcl'"),
    "a wrong number": (b"model: tiny\nbenchmarks: {fixture: -4}\n", "benchmarks.fixture: Input should be greater"),
    "no benchmark": (b"model: tiny\nbenchmarks: {fixtur: 4}\n", "no benchmark 'fixtur', did you mean 'fixture'?"),
    "a variant's key": (GOOD.encode() + b"variants: {x: {epoch: 3}}\n", "variants.x: no key 'epoch', did you"),
    "a name": (GOOD.encode() + b"name: ../x\n", "'../x' is no name for a folder"),
    "no model": (b"benchmarks: {fixture: 4}\n", "model: Field required"),
    "a tag": (b"model: !!python/object/apply:os.getcwd []\n", "line 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_is_said_in_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = BROKEN[kind]
    path = tmp_path / "own.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"own\.yaml") as error:
        load_profile(str(path))
    message = str(error.value)
    assert said in message and "\n" not in message
    assert notebooks.main(["export", "--profile", str(path), "--to", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.strip() == message


def test_a_folder_is_no_profile(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").mkdir()
    with pytest.raises(ValueError, match=r"own\.yaml: can't be read"):
        load_profile(str(tmp_path / "own.yaml"))


def test_a_good_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(GOOD)
    assert load_profile(str(path), tau=0.5).tau == 0.5


def test_n_reaches_variants() -> None:
    full = load_profile("full", n=4)
    counts = {v: full.variant(v).benchmarks for v in full.variants}
    assert all(n is not None and n <= 4 for of in counts.values() for n in of.values()), counts
    assert load_profile("full", n=200).variant("k4").benchmarks == {"sealtool": 147}


def test_a_likelihood_is_of_one_answer(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(GOOD + "inference: [majority]\nuncertainty: likelihood\n")
    with pytest.raises(ValueError, match="where several are drawn"):
        load_profile(str(path))


def test_an_arm_changes_only_what_keys_know_of() -> None:
    with pytest.raises(ValueError, match="can't change layout"):
        Arm(UNCERTAIN, under={"layout": "paper"})
