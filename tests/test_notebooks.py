"""The notebooks' form, the runner's promises, and every notebook through papermill with profile `smoke`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

from study import notebooks
from study.notebooks import WrongParameter
from study.run.asked import read_or_run
from study.run.study import Study, open_study

ALL = notebooks.notebooks()
KERNEL = {"name": "nosuch", "display_name": "", "language": "python"}
each = pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)


def cells(path, kind):
    return [c for c in nbformat.read(path, 4).cells if c["cell_type"] == kind]


# --- the form -------------------------------------------------------------------------------------------


def test_the_promised_notebooks_are_there():
    assert {
        "00_data_and_prompts", "01_self_awareness", "02_main_results", "03_learning_methods", "04_threshold",
        "05_data_scaling", "06_model_size", "07_synthetic_data", "08_cost", "09_controls",
    } <= {p.stem for p in ALL}  # fmt: skip


@each
def test_form(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [c["source"] for c in cells(path, "code")]
    prose = [c["source"] for c in cells(path, "markdown")]
    assert prose[0].startswith("# ")
    assert notebook.cells[0]["cell_type"] == "markdown"
    assert len(notebook.cells) <= 40
    # The parameters are a list to choose from. A cell makes a choice, seen at a glance; what can be wrong
    # without looking wrong belongs into the package.
    assert max(len(c.splitlines()) for c in code if not c.startswith('profile = "')) <= 15
    assert max(len(line) for c in code for line in c.splitlines()) <= 110
    assert sum(len(p.split()) for p in prose) > 3 * sum(len(c.splitlines()) for c in code), "words to a line"
    assert any(p.startswith("## Limits") for p in prose)


@each
def test_parameters_cell(path):
    (cell,) = [c for c in cells(path, "code") if "parameters" in c["metadata"].get("tags", [])]
    assert cell["source"].startswith('profile = "full"')
    live = path.stem.startswith("10")  # asks a model, unless it is told otherwise
    source = "None" if live else '"results/full"'
    assert f"\nsource = {source}" in cell["source"], "every notebook can read an exported run"
    assert all("#" in line for line in cell["source"].splitlines()), "each parameter says what it is"


def test_what_every_notebook_imports_is_light():
    program = """import sys
from study.analysis import answers, figures, look
from study.run.study import open_study
print({"torch", "transformers", "jsonschema", "sklearn", "seaborn", "scipy.stats"} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n", "whoever opens a notebook waits for it"


@each
def test_no_error_is_committed(path):
    outputs = [o for c in cells(path, "code") for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]


@each
def test_committed_outputs_are_those_of_the_committed_cells(path):
    """`keep` writes the hash; a cell that is edited after it leaves outputs that nothing stands behind."""
    notebook = nbformat.read(path, 4)
    if not any(c["outputs"] for c in cells(path, "code")):
        pytest.skip(f"{path.stem} carries no outputs yet: run `python -m study.notebooks keep`")
    assert notebook.metadata["ttsi"]["sources"] == notebooks.sources_hash(notebook)
    assert all(c["execution_count"] for c in cells(path, "code"))
    written = "".join(str(o.get("text", "")) + str(o.get("data", "")) for c in cells(path, "code")
                      for o in c["outputs"])  # fmt: skip
    assert "/work/" not in written and "/home/" not in written and "/tmp/" not in written


# --- parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("n=8", {"n": 8}),
        ("benchmarks=['sealtool'] n=8", {"benchmarks": ["sealtool"], "n": 8}),
        ("  tau=[0.2, 0.5,0.95]   mode=exact ", {"tau": [0.2, 0.5, 0.95], "mode": "exact"}),
        ("benchmarks={'bfcl': 4, 'sealtool': None}", {"benchmarks": {"bfcl": 4, "sealtool": None}}),
        ("name='a b=c' n=None", {"name": "a b=c", "n": None}),
        ("profile=my/own.yaml", {"profile": "my/own.yaml"}),
        ("a=[[1, 2], [3]] n=8", {"a": [[1, 2], [3]], "n": 8}),
        ("b={'x': {'y': 1}}", {"b": {"x": {"y": 1}}}),
        ("question='What\\'s new?' n=1", {"question": "What's new?", "n": 1}),
        ('q="a ] b" r=(1, [2])', {"q": "a ] b", "r": (1, [2])}),
        ("queries=[10**3, 10**4]", {"queries": [1000, 10000]}),
        ("n=2*3 tau=-0.5", {"n": 6, "tau": -0.5}),
        ("day=2024-01-02 range=1-2", {"day": "2024-01-02", "range": "1-2"}),
    ],
)
def test_read_parameters(text, expected):
    assert notebooks.read_parameters(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "benchmarks=[sealtool]",
        "n",
        "n = 8",
        "tau=[0.2",
        "n=8 'x'",
        "a=[10**10**10]",
        "q='open",
        "b={**x}",
        "c=(lambda: 1)",
    ],
)
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(WrongParameter):
        notebooks.read_parameters(text)


def test_every_default_can_be_given_as_it_is_printed():
    for path in notebooks.notebooks():
        for name, parameter in papermill.inspect_notebook(path).items():
            given = notebooks.read_parameters(f"{name}={parameter['default']} last=1")
            assert given.keys() == {name, "last"}, (path.stem, parameter)


def test_parameters_are_never_run_as_code(tmp_path):
    target = tmp_path / "made"
    text = f"n=open('{target}','w')"
    assert notebooks.read_parameters(text) == {"n": text[2:]}
    assert not target.exists()


@each
def test_a_wrong_parameter_names_the_right_ones(path, capsys, monkeypatch):
    monkeypatch.setenv("TTSI_ARGS", "treshold=0.5")
    assert notebooks.main(["run", path.stem[:2], "--profile", "smoke"]) == 2
    message = capsys.readouterr().err
    assert f"{path.stem} has no parameter treshold" in message
    for known in ("profile", "source"):
        assert f"  {known} = " in message


def test_unknown_notebook_and_profile_are_one_line(capsys):
    assert notebooks.main(["run", "77"]) == 2
    assert "02_main_results" in capsys.readouterr().err
    assert notebooks.main(["reproduce", "--profile", "nosuch"]) == 1
    assert "no profile 'nosuch'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "given", "said"),
    [
        ("02", "benchmarks=['sealtol']", "no benchmark 'sealtol', did you mean 'sealtool'? there are "),
        ("02", "benchmarks=sealtool", "benchmarks = 'sealtool' is no list of names"),
        ("02", "n=-3", "n = -3 is no number of samples"),
        ("00", "n=few", "n = 'few' is no number of samples"),
        ("02", "mode=fast", "mode = 'fast' is neither 'exact' nor 'activated'"),
        ("02", "tau=1.5", "tau: Input should be less than or equal to 1.000001, not 1.5"),
        ("01", "tau=[0.2,1.5]", "tau: Input should be less than or equal to 1.000001, not 1.5"),
        ("02", "k=0", "k: Input should be greater than or equal to 1, not 0"),
        ("02", "seeds=3", "seeds: Input should be a valid list, not 3"),
        ("02", "tool_order=random", "tool_order: Input should be 'shuffled' or 'original', not 'random'"),
        ("02", "arms=['tt_sy']", "no arm 'tt_sy', did you mean 'tt_si'? there are base, "),
        ("04", "benchmark=sealtol", "benchmark = 'sealtol' is not in profile full, did you mean 'sealtool'?"),
        ("02", "tau=1.5 source=results/full", "tau: Input should be less than or equal to 1.000001, not 1.5"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_before_anything_runs(number, given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path / "runs"))
    assert notebooks.main(["run", number, *given.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(said) and len(printed.err.splitlines()) == 1
    assert printed.out == "" and not list(tmp_path.rglob("*.ipynb"))


def test_a_wrong_profile_lists_the_right_ones(tmp_path, capsys):
    assert notebooks.main(["run", "02", "--profile", "foo"]) == 1
    assert capsys.readouterr().err.startswith("no profile 'foo'; there are full, paper, smoke;")
    (tmp_path / "own.yaml").write_text("model: tiny\nbenchmarks: {fixture: 4}\nepoch: 3\n")
    assert notebooks.main(["run", "02", "--profile", str(tmp_path / "own.yaml")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("own.yaml: no key 'epoch', did you mean 'epochs'? there are name, model, ")
    assert len(said.splitlines()) == 1


# --- what a run is filed under --------------------------------------------------------------------------


def test_a_name_is_none_of_a_profile_s_and_one_for_a_folder(monkeypatch):
    monkeypatch.delenv("TTSI_NAME", raising=False)
    assert notebooks.filed_under("full", changed=False) == "full"
    assert notebooks.filed_under("full", changed=True) == "full-changed"
    monkeypatch.setenv("TTSI_NAME", "my-run")
    assert notebooks.filed_under("full", changed=False) == notebooks.filed_under("full", True) == "my-run"
    for name, base, changed in (("full", "full", True), ("full", "smoke", False), ("../full", "full", False)):
        monkeypatch.setenv("TTSI_NAME", name)
        with pytest.raises(ValueError, match=r"is a profile's|is no name for a folder"):
            notebooks.filed_under(base, changed)


def test_what_changes_a_run_is_what_the_notebook_does_not_say_itself():
    path = notebooks.find("04")
    assert notebooks.changes(path, {"profile": "smoke", "source": "x", "n": None, "tau": [0.35, 0.95]}) == []
    assert notebooks.changes(path, {"tau": [0.35], "n": 3}) == ["tau=[0.35]", "n=3"]


def test_make_takes_a_name_only_as_it_is_typed():
    """Some systems set NAME to the machine's; the tests may run below another make."""

    def shown(*typed, **places):
        inherited = ("TTSI_NAME", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
        environment = {k: v for k, v in os.environ.items() if k not in inherited} | places
        command = ["make", "-s", "--eval", 'shown:;@echo "$$TTSI_NAME"', "shown", *typed]
        root = Path(notebooks.__file__).parent.parent
        return subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True
        ).stdout.strip()

    assert shown() == shown(NAME="HOST") == ""
    assert shown("NAME=my-run", NAME="HOST") == "my-run"
    assert shown(TTSI_NAME="mine") == "mine"


def test_a_notebook_opened_by_hand_leaves_the_profile_s_figures_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("TTSI_NAME", raising=False)
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(notebooks.NOTEBOOKS)  # where Jupyter runs them
    assert open_study("smoke", n=None).profile.name == "smoke"
    changed = open_study("smoke", n=3)
    assert changed.profile.name == "smoke-changed"
    assert changed.folder == open_study("smoke").folder, "what is stored is used again"
    assert "`smoke-changed` of profile `smoke`" in changed.header()
    read = open_study("full", source="results/full")
    assert read.profile.name == "full" and len(read.records())
    assert open_study("full", source="results/full", n=1).profile.name == "full-changed"
    monkeypatch.setenv("TTSI_NAME", "lab")
    assert open_study("smoke").profile.name == open_study("full", source="results/full").profile.name == "lab"


def test_committed_records_are_read_where_they_answer(capsys):
    def source(reads=True, **asked):
        return read_or_run({"profile": "full"} | asked, Path("results"), reads)["source"]

    folder = notebooks.NOTEBOOKS.parent / "results" / "full"
    assert source() == source(n=8, tau=[0.5], benchmarks=["sealtool"]) == str(folder)
    assert "nothing is computed" in capsys.readouterr().out
    assert {source(k=2), source(source=None), source(profile="smoke"), source(reads=False)} == {None}
    assert source(benchmarks={"mine": {"path": "tests/fixtures/none.jsonl"}}) is None
    assert capsys.readouterr().out == ""
    named = read_or_run({"profile": "smoke", "source": "results/full"}, Path("results"), True)
    assert named == {"profile": "full", "source": "results/full"}
    with pytest.raises(ValueError, match="holds results of full, not smoke: source=None runs smoke"):
        open_study("smoke", source="results/full")


def test_the_lab_shows_the_whole_project_whoever_starts_it(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--no-browser --ServerApp.port={port} --ServerApp.token=t --ServerApp.port_retries=0"
    command = ["make", "-o", ".venv/.complete", "lab", f"PY={sys.executable}", f"ARGS={options}"]
    root, places = Path(notebooks.__file__).parent.parent, {"HOME": str(tmp_path)}
    lab = subprocess.Popen(command, cwd=root, env=os.environ | places, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    try:
        found = set()
        for _ in range(120):
            time.sleep(0.5)
            assert lab.poll() is None
            with contextlib.suppress(OSError):
                asked = urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents?token=t", timeout=5)
                found = {entry["name"] for entry in json.load(asked)["content"]}
                break
        assert {"notebooks", "study", "ttsi", "results", "README.md"} <= found
    finally:
        os.killpg(lab.pid, signal.SIGKILL)
        lab.wait()


# --- running --------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of notebooks of the test's own; returns a function that writes one there."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(notebooks, "NOTEBOOKS", folder)
    monkeypatch.setenv("TTSI_RUNS", str(tmp_path / "runs"))

    def put(name, *sources):
        made = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL})
        made.cells = [nbformat.v4.new_code_cell(s) for s in ('profile = "full"\nn = 1  # how many', *sources)]
        made.cells[0]["metadata"]["tags"] = ["parameters"]
        nbformat.write(made, folder / f"{name}.ipynb")

    return put


def test_a_run_uses_this_interpreter_and_the_given_values(shelf, tmp_path):
    shelf("05_which", "import sys\nprint(sys.executable, profile, n)")
    assert notebooks.main(["run", "5", "--profile", "smoke", "n=7"]) == 0
    copy = nbformat.read(tmp_path / "runs" / "smoke-changed" / "05_which.ipynb", 4)
    printed = [o["text"].strip() for c in copy.cells for o in c["outputs"]]
    assert printed == [f"{sys.executable} smoke 7"]


def test_a_notebook_sees_nothing_of_the_one_before(shelf, tmp_path):
    """They share a kernel, and nothing but what it has imported and the models it has loaded."""
    load = (
        "from study.run.study import Study\nengine = Study('smoke').engine\nassert not engine.counters.passes"
    )
    shelf("01_first", load + "\nengine.counters.passes = 1", "import os\nkept = [os.getpid()]\nkept")
    loaded = "from study.run.study import Study\nassert Study('smoke').engine.counters.passes == 1"
    shelf("02_second", loaded, "import os\nprint('kept' in globals(), Out, os.getpid())")
    with notebooks.this_kernel() as kernel:
        copies = [notebooks.execute(p, {"profile": "smoke"}, kernel, "smoke") for p in notebooks.notebooks()]
    first, second = (nbformat.read(copy, 4).cells[-1] for copy in copies)
    pid = first["outputs"][0]["data"]["text/plain"].strip("[]")
    assert second["outputs"][0]["text"] == f"False {{}} {pid}\n"
    assert first["execution_count"] == second["execution_count"], "counted from 1"
    assert not Path(f"/proc/{pid}").exists()


def test_a_failed_notebook_stops_the_run_and_leaves_nothing(shelf, tmp_path, capsys):
    shelf("01_good", "print(1)")
    shelf("02_bad", "print('half')", "1 / 0")
    shelf("03_after", "print(3)")

    def environment():  # scikit-learn sets two KMP_* for its threads when it is first imported
        return {k: v for k, v in os.environ.items() if not k.startswith("KMP_")}

    before = environment()
    assert notebooks.main(["run", "02", "--profile", "smoke"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(notebooks.PapermillExecutionError):
        notebooks.run_all(notebooks.notebooks(), {"profile": "smoke"}, "smoke")
    left = [p.name for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    assert sorted(left) == ["01_good.ipynb", "store.sqlite"]
    assert environment() == before


def test_a_dead_kernel_is_one_line(shelf, tmp_path, capsys):
    shelf("01_killed", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert notebooks.main(["run", "01", "--profile", "smoke"]) == 1
    assert "process died" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("*.ipynb"))


def test_progress_is_shown_and_not_kept(shelf, tmp_path, capfd):
    shelf("01_bar", "import sys\nfrom tqdm import tqdm\nfor _ in tqdm(range(3), file=sys.stderr): pass")
    assert notebooks.main(["run", "01", "--profile", "smoke"]) == 0
    assert "3/3" in capfd.readouterr().err
    copy = nbformat.read(tmp_path / "runs" / "smoke" / "01_bar.ipynb", 4)
    assert [o for c in copy.cells for o in c["outputs"]] == []


def test_outputs_are_kept_only_for_the_cells_that_made_them(shelf, tmp_path, capsys):
    shelf("01_good", "print(n + 1)")
    path = tmp_path / "notebooks" / "01_good.ipynb"
    assert notebooks.main(["run", "01", "--profile", "smoke"]) == 0
    assert notebooks.keep_outputs("smoke", ["01"]) == notebooks.keep_outputs("smoke") == [path]
    assert notebooks.main(["keep", "--profile", "smoke"]) == 0
    kept = nbformat.read(path, 4)
    assert [o["text"] for c in kept.cells for o in c["outputs"]] == ["2\n"]
    assert len(kept.cells) == 2, "the cells stay the notebook's own: nothing is injected"
    assert kept.metadata["ttsi"]["sources"] == notebooks.sources_hash(kept)
    kept.cells[1]["source"] += "  # edited"
    assert kept.metadata["ttsi"]["sources"] != notebooks.sources_hash(kept)
    nbformat.write(kept, path)
    assert notebooks.main(["keep", "--profile", "smoke"]) == 1
    assert "01_good.ipynb has changed" in capsys.readouterr().err


def test_a_notebook_carries_the_outputs_of_one_run(shelf, tmp_path, capsys):
    shelf("01_first", "print(profile, n)")
    shelf("02_second", "print(profile, n)")
    path, other = notebooks.notebooks()
    assert notebooks.main(["run", "01", "--profile", "smoke"]) == 0
    assert notebooks.main(["run", "02", "--profile", "smoke"]) == 0
    notebooks.keep_outputs("smoke")
    # What a changed run shows is never kept under a notebook's own parameters, by whatever name it is filed.
    assert notebooks.main(["run", "01", "--profile", "smoke", "n=4"]) == 0
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"was run with n=4"):
        notebooks.keep_outputs("smoke-changed", ["01"])
    # Outputs of another run stay where they are, unless they are named.
    for name in ("01_first", "02_second"):
        copy = tmp_path / "runs" / "other" / f"{name}.ipynb"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((tmp_path / "runs" / "smoke" / copy.name).read_bytes())
    assert notebooks.keep_outputs("other") == []
    assert "01_first.ipynb keeps the outputs of smoke; N=01 replaces them" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert notebooks.keep_outputs("other", ["02"]) == [other]
    carried = [nbformat.read(p, 4).metadata["ttsi"]["profile"] for p in (path, other)]
    assert carried == ["smoke", "other"]


# --- the study, end to end ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Folder of a finished `reproduce --profile smoke`, and what it printed."""
    folder = tmp_path_factory.mktemp("smoke")
    return folder, reproduce(folder)


def reproduce(folder, *command):
    """What `reproduce --profile smoke`, or another command, printed; its results are in the folder."""
    environment = os.environ | {"TTSI_RUNS": str(folder / "runs"), "TTSI_FIGURES": str(folder / "figures")}
    command = [sys.executable, "-m", "study.notebooks", *(command or ["reproduce"]), "--profile", "smoke"]
    root = Path(notebooks.__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_every_notebook_runs_with_the_smoke_profile(smoke):
    folder, printed = smoke
    copies = sorted((folder / "runs" / "smoke").glob("*.ipynb"))
    assert [p.name for p in copies] == [p.name for p in ALL]
    assert printed.startswith("Plan of profile smoke")
    for copy in copies:
        outputs = [o for c in cells(copy, "code") for o in c["outputs"]]
        assert not [o for o in outputs if o["output_type"] == "error"]
        assert any("image/png" in o.get("data", {}) for o in outputs)
        assert any("commit" in o.get("data", {}).get("text/markdown", "") for o in outputs), "says which run"


def test_the_outputs_have_their_fixed_names(smoke):
    folder = smoke[0] / "figures" / "smoke"
    made = {p.name for p in folder.iterdir()}
    for table in ("table1_main", "table2_threshold", "table_cost", "table_controls", "table_scale"):
        assert {f"{table}.csv", f"{table}.md"} <= made
    for figure in (
        "figure2_methods", "figure2_scaling", "figure3_model_size", "figure4_estimator", "figure5_embeddings",
        "figure_break_even", "figure_scale",
    ):  # fmt: skip
        assert {f"{figure}.{kind}" for kind in ("csv", "pdf", "png")} <= made
    assert not [name for name in made if name.startswith(".")]
    assert not [
        p.name for p in folder.iterdir() if p.suffix == ".csv" and len(p.read_text().splitlines()) < 2
    ]


def test_the_tables_of_the_smoke_run_agree_with_each_other(smoke):
    """One answer, one number: whichever notebook shows it."""
    folder = smoke[0] / "figures" / "smoke"
    main = pd.read_csv(folder / "table1_main.csv").query("arm == 'tt_si' and inference == 'direct'")
    sweep = pd.read_csv(folder / "table2_threshold.csv").query("rule == '0.95'").set_index("mode")
    methods = pd.read_csv(folder / "figure2_methods.csv").query("arm == 'tt_si'").set_index("mode")
    ends = pd.read_csv(folder / "figure2_scaling.csv").query("arm == 'tt_si'").groupby("mode").last()
    controls = pd.read_csv(folder / "table_controls.csv").query("control == 'tt_si'").set_index("mode")
    for row in main.to_dict("records"):
        for table in (sweep, methods, ends, controls):
            assert table.loc[row["mode"], "accuracy"] == pytest.approx(row["accuracy"], abs=1e-3)
            name = "base_difference" if table is controls else "difference"
            assert table.loc[row["mode"], name] == pytest.approx(row["difference"], abs=1e-3)


def test_what_the_smoke_profile_leaves_out_says_so(smoke):
    controls = pd.read_csv(smoke[0] / "figures" / "smoke" / "table_controls.csv")
    absent = controls[controls["note"] == "not run in this profile"]
    assert len(absent) > 0 and absent["accuracy"].isna().all()
    assert "not run in this profile" in (smoke[0] / "figures" / "smoke" / "table_controls.md").read_text()


def test_table1_of_the_smoke_run_is_computed_and_complete(smoke):
    table = pd.read_csv(smoke[0] / "figures" / "smoke" / "table1_main.csv")
    run = table[table["accuracy"].notna()]
    assert {"base", "tt_si"} <= set(run["arm"])
    assert (run["computed"] == run["n"] * run["seeds"]).all()
    assert (run["loaded"] == 0).all()
    assert (run["errors"] == 0).all()
    assert run["accuracy"].between(run["low"], run["high"]).all()


def test_the_smoke_run_holds_every_kind_of_sample(smoke, monkeypatch):
    """Else it would pass with half of the method never run."""
    monkeypatch.setenv("TTSI_RUNS", str(smoke[0] / "runs"))
    records = Study("smoke").records()
    records = records[records["inference"] == "direct"]
    base, tt_si = (records[records["arm"] == arm].set_index("sample") for arm in ("base", "tt_si"))
    assert set(base["correct"]) == {True, False}
    assert not tt_si["uncertain"].all(), "certain"
    assert tt_si["synthesis_failed"].any()
    adapted = tt_si[tt_si["adapted"]]
    assert set(adapted["mode"]) == {"activated", "exact"}
    assert (adapted["reply"] != base.loc[adapted.index, "reply"].to_numpy()).any(), "to another answer"


@pytest.mark.parametrize("number", ["02", "05"])
def test_running_again_gives_the_same_tables(smoke, number):
    folder, _ = smoke
    tables = {p.name: p.read_bytes() for p in (folder / "figures" / "smoke").glob("*.csv")}
    reproduce(folder, "run", number)
    assert {p.name: p.read_bytes() for p in (folder / "figures" / "smoke").glob("*.csv")} == tables


def test_a_run_killed_in_the_middle_ends_with_the_same_table(smoke, tmp_path):
    table = Path("figures", "smoke", "table1_main.csv")
    env = {**os.environ, "TTSI_RUNS": str(tmp_path / "runs"), "TTSI_FIGURES": str(tmp_path / "figures")}
    command = [sys.executable, "-m", "study.notebooks", "run", "02", "--profile", "smoke"]
    process = subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    store = tmp_path / "runs" / "smoke" / "store.sqlite"
    while process.poll() is None and not store.exists():
        time.sleep(0.05)
    time.sleep(3.0)
    os.killpg(process.pid, signal.SIGKILL)  # the runner and its kernel
    process.wait()
    assert not (tmp_path / table).exists()
    reproduce(tmp_path, "run", "02")
    assert (tmp_path / table).read_bytes() == (smoke[0] / table).read_bytes()
