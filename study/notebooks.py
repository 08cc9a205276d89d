"""Runs the notebooks in order, through papermill, with this interpreter: `python -m study.notebooks`.

    reproduce --profile full [--load results/full]     all notebooks, the plan first; on from an exported run
    run 02 --profile full benchmarks=['sealtool'] n=8  one notebook with other parameters, an estimate first
    figures --from results/full                        tables and figures of an exported run: no model
    reproduce --from results/full --minutes 25         the same, then a part of it computed anew and compared
    export --profile full                              what was run into results/full, ready to be committed
    keep --profile full [01 02 …]                      the outputs of a finished run into the notebooks
    list                                               the notebooks and their parameters

Executed copies go to runs/<name>/, tables and figures to figures/<name>/. The name is the profile's or, where
parameters are changed, `<profile>-changed`; TTSI_NAME sets another. A notebook that fails leaves no copy and
ends the run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbclient.util import run_sync
from papermill.exceptions import PapermillExecutionError

from study.analysis.look import write
from study.data import sources
from study.run import reproduction, results
from study.run.asked import opened, read_or_run, with_own_data
from study.run.config import DEFAULT, load_profile, profile_names
from study.run.export import export as export_to
from study.run.export import load_into
from study.run.plan import estimate
from study.run.plan import plan as plan_of
from study.run.store import StoreError
from study.run.study import Study
from study.run.written import WrongParameter, folder_name, read_parameters

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
RESULTS = Path("results")
ARGS, NAME = "TTSI_ARGS", "TTSI_NAME"
_EXPECTED = {"BrokenData", "StoreError", "Unavailable", "WrongBytes"}
"""Errors whose messages say all there is to say."""
_KERNEL = "ttsi-this-python"
_LAUNCH = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "runpy.run_module('ipykernel_launcher', run_name='__main__')"
)
"""Ctrl-C is this process's to answer: a kernel that it meets while starting prints a traceback of its own."""
_EMPTY = "from study.run import engines\nengines.keep_models()\nget_ipython().reset()"
_ANSI = re.compile(r"\x1b\[[\d;]*[A-Za-z]")


def notebooks() -> list[Path]:
    """The notebooks, in the order in which they are run."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def find(number: str) -> Path:
    """The notebook with this number ('2', '02' or its name). Raises WrongParameter if there is none."""
    wanted = number.zfill(2)
    for path in notebooks():
        if wanted in (path.stem[:2], path.stem, path.name):
            return path
    raise WrongParameter(f"no notebook {number!r}; there are {', '.join(p.stem for p in notebooks())}")


def check_parameters(path: Path, given: Mapping[str, Any]) -> None:
    """Nothing; raises WrongParameter, with the notebook's own parameters, if it lacks one of these."""
    known = papermill.inspect_notebook(path)
    wrong = [name for name in given if name not in known]
    if wrong:
        right = "\n".join(f"  {p['name']} = {p['default']}  {p['help']}".rstrip() for p in known.values())
        raise WrongParameter(f"{path.stem} has no parameter {', '.join(wrong)}; it has\n{right}")


def changes(path: Path, parameters: Mapping[str, Any]) -> list[str]:
    """The parameters that are not the notebook's own, as they are written; profile and source are free."""
    known, found = papermill.inspect_notebook(path), []
    for key, value in parameters.items():
        default = read_parameters(f"{key}={known[key]['default']}")[key] if key in known else None
        if key not in ("profile", "source") and value != default:
            found.append(f"{key}={value!r}")
    return found


def filed_under(base: str, changed: bool) -> str:
    """What a run is filed under: TTSI_NAME, else its profile's name, or one beside that where it is changed.

    Raises WrongParameter for the name of a profile that this run is not, ValueError for what is no name.
    """
    name = os.environ.get(NAME) or f"{base}{'-changed' * changed}"
    if (changed or name != base) and name in profile_names():
        raise WrongParameter(f"NAME={name} is a profile's, whose tables and figures this run would replace")
    return folder_name(name)


def execute(path: Path, parameters: Mapping[str, Any], kernel: AsyncKernelManager, name: str) -> Path:
    """Path of the executed copy, runs/<name>/<notebook>; written only once every cell has run.

    The kernel is started if it isn't running, else emptied, and left running for the next notebook.
    Raises WrongParameter before anything runs, PapermillExecutionError where a cell fails.
    """
    check_parameters(path, parameters)
    if kernel.has_kernel:
        run_sync(_empty)(kernel)
    notebook = papermill.execute_notebook(
        path, None, parameters=dict(parameters), kernel_name=kernel.kernel_name, language="python",
        progress_bar=False, stderr_file=sys.stderr, km=kernel,
    )  # fmt: skip
    for cell in notebook.cells:
        if cell["cell_type"] == "code":
            cell["outputs"] = [o for o in map(_without_progress, cell["outputs"]) if o]
    return write(sources.runs_dir() / name / path.name, nbformat.writes(notebook).encode())  # type: ignore[no-untyped-call]


async def _empty(kernel: AsyncKernelManager) -> None:
    """Leaves nothing of the last notebook but the modules it has imported and the models it has loaded."""
    client = kernel.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=60)
        await client.execute(_EMPTY, silent=True, reply=True, timeout=60)
    finally:
        client.stop_channels()


def _without_progress(output: Any) -> Any:
    """The output less its progress bars, which say nothing once they are full; None if nothing is left."""
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return None
    if output["output_type"] != "stream" or output["name"] != "stderr":
        return output
    lines = [_ANSI.sub("", line.rpartition("\r")[2]) for line in output["text"].split("\n")]
    output["text"] = "\n".join(line for line in lines if "%|" not in line)
    return output if output["text"].strip() else None


def sources_hash(notebook: Any) -> str:
    """SHA-256 of all cells' sources: whether the outputs in a notebook are those of its cells."""
    cells = [[c["cell_type"], c["source"]] for c in notebook.cells]
    return hashlib.sha256(json.dumps(cells, ensure_ascii=False).encode()).hexdigest()


def keep_outputs(name: str, numbers: Sequence[str] = ()) -> list[Path]:
    """The notebooks that now carry the outputs of a run's executed copies, ready to be committed.

    numbers: which of them; unless told otherwise all, less those that carry another run's. Their cells stay
    as they are; the run's name and the hash of their sources go into the metadata. Raises ValueError, and
    writes nothing, for a copy whose cells are no longer the notebook's, or whose parameters were others: what
    it shows is not what its notebook says.
    """
    kept = {}
    for path in map(find, numbers) if numbers else notebooks():
        executed = sources.runs_dir() / name / path.name
        if not executed.exists():
            continue
        notebook, copy = (nbformat.read(p, 4) for p in (path, executed))  # type: ignore[no-untyped-call]
        carried = notebook.metadata.get("ttsi", {}).get("profile", name)
        if carried != name and not numbers:
            print(f"{path.name} keeps the outputs of {carried}; N={path.stem[:2]} replaces them")
            continue
        if others := changes(path, copy.metadata.get("papermill", {}).get("parameters", {})):
            raise ValueError(f"{executed} was run with {', '.join(others)}: no outputs of its notebook's")
        done = {c["id"]: c for c in copy.cells}
        for cell in notebook.cells:
            other = done.get(cell["id"])
            if other is None or other["source"] != cell["source"]:
                raise ValueError(f"{path.name} has changed since {executed} was run: run it again")
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = other["outputs"], other["execution_count"]
        notebook.metadata["ttsi"] = {"profile": name, "sources": sources_hash(notebook)}
        kept[path] = nbformat.writes(notebook).encode()  # type: ignore[no-untyped-call]
    return [write(path, content) for path, content in kept.items()]


@contextlib.contextmanager
def this_kernel() -> Iterator[AsyncKernelManager]:
    """A kernel, not yet started, that runs this very interpreter, for the time of a with block.

    Registered in a temporary folder: a kernel named python3 in the user's home may be another Python.
    IPython's and Jupyter's folders point there as well, so neither start-up files nor a home are needed.
    """
    with tempfile.TemporaryDirectory(prefix="ttsi-jupyter-") as folder:
        spec = Path(folder) / "kernels" / _KERNEL / "kernel.json"
        spec.parent.mkdir(parents=True)
        argv = [sys.executable, "-c", _LAUNCH, "-f", "{connection_file}", "--log-level=50"]
        spec.write_text(json.dumps({"argv": argv, "display_name": "Python 3 (ttsi)", "language": "python"}))
        before = dict(os.environ)
        os.environ |= {"JUPYTER_PATH": folder, "JUPYTER_RUNTIME_DIR": folder, "IPYTHONDIR": folder}
        kernel = AsyncKernelManager(kernel_name=_KERNEL)
        try:
            yield kernel
        finally:
            if kernel.has_kernel:
                run_sync(kernel.shutdown_kernel)()
            os.environ.clear()
            os.environ.update(before)


def run_all(paths: Sequence[Path], parameters: Mapping[str, Any], name: str) -> None:
    """Runs the notebooks one after the other, says which and how long; raises like `execute`.

    name: what the run is filed under. All in one kernel, emptied in between: to import everything anew takes
    longer than most of them.
    """
    for path in paths:
        check_parameters(path, parameters)
    began = time.monotonic()
    with this_kernel() as kernel:
        os.environ[NAME] = name
        for number, path in enumerate(paths, 1):
            start = time.monotonic()
            print(f"[{number}/{len(paths)}] {path.stem} …", flush=True)
            copy = execute(path, parameters, kernel, name)
            print(
                f"[{number}/{len(paths)}] {path.stem} done in {time.monotonic() - start:.0f} s: {copy}",
                flush=True,
            )
    took = f"{len(paths)} notebook{'s' * (len(paths) > 1)} in {(time.monotonic() - began) / 60:.1f} min"
    folder = sources.figures_dir() / name
    print(f"{took}; tables and figures: {folder}" if folder.exists() else f"{took}; no table and no figure")


def run_one(path: Path, parameters: Mapping[str, Any]) -> None:
    """Runs a notebook once its parameters are checked, by name and by value, and its estimate is printed."""
    check_parameters(path, parameters)
    source = parameters.get("source")
    base = results.Results(sources.found(source)).profile if source else load_profile(parameters["profile"])
    name = filed_under(base.name, changed=bool(changes(path, parameters)))
    study = opened(parameters)
    if isinstance(study, Study):
        if "n" in papermill.inspect_notebook(path):
            print(estimate(study), flush=True)
        study.store.close()
    run_all([path], with_own_data(parameters, study.profile, name), name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the command line: 0 done, 1 failed, 2 asked wrongly, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m study.notebooks", description="Runs the study's notebooks."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reproduce = commands.add_parser("reproduce", help="all notebooks in order")
    run = commands.add_parser("run", help=f"one notebook; key=value: its parameters, also read from {ARGS}")
    run.add_argument("number", help="e.g. 02")
    figures = commands.add_parser("figures", help="all notebooks from an exported run, nothing computed")
    export = commands.add_parser("export", help="writes a run's records, without a benchmark's text")
    export.add_argument("--onto", action="store_true", help="what the folder holds of earlier machines stays")
    export.add_argument("--to", type=Path, help="folder; results/<profile> unless told otherwise")
    for command in (reproduce, run, export):
        command.add_argument("--profile", default=DEFAULT)
    figures.add_argument("--from", dest="source", type=Path, default=RESULTS / DEFAULT, help="its folder")
    reproduce.add_argument("--from", dest="source", type=Path, help="folder of an exported run to check")
    reproduce.add_argument("--load", type=Path, help="folder of an exported run to go on from")
    reproduce.add_argument("--minutes", type=float, default=25, help="with --from: spent on computing anew")
    reproduce.add_argument("--draw", type=int, default=0, help="with --from: seed of what is computed anew")
    keep = commands.add_parser("keep", help="puts the outputs of a finished run into the notebooks")
    keep.add_argument("--profile", default=DEFAULT)
    keep.add_argument("numbers", nargs="*", help="which notebooks, e.g. 01 02; all unless told otherwise")
    commands.add_parser("list", help="the notebooks and their parameters")
    asked, rest = parser.parse_known_args(arguments)
    if rest and asked.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        if asked.command == "list":
            for path in notebooks():
                print(
                    path.stem,
                    *(f"  {p['name']}={p['default']}" for p in papermill.inspect_notebook(path).values()),
                )
        elif asked.command == "keep":
            for path in keep_outputs(load_profile(asked.profile).name, asked.numbers):
                print(path)
        elif asked.command == "run":
            given = read_parameters(os.environ.get(ARGS, "")) | read_parameters(" ".join(rest))
            path, wanted = find(asked.number), {"profile": asked.profile} | given
            own = papermill.inspect_notebook(path).get("source")
            run_one(path, read_or_run(wanted, RESULTS, own["default"] != "None") if own else wanted)
        elif asked.command == "export":
            study = Study(load_profile(asked.profile))
            folder = export_to(study, asked.to or RESULTS / study.profile.name, asked.onto)
            size = sum(path.stat().st_size for path in folder.iterdir())
            held = len(pd.read_parquet(folder / "records.parquet", columns=["sample"]))
            print(f"{held} records and what they come from: {folder}, {size / 1e6:.1f} MB")
        elif asked.source:
            name = results.Results(asked.source).profile.name
            of = {"profile": name, "source": str(asked.source.absolute())}
            filed = filed_under(name, changed=False)
            run_all(notebooks(), of, filed)
            if asked.command == "reproduce" and asked.minutes:
                here = reproduction.recompute(asked.source, asked.minutes, asked.draw)
                run_all([find("12")], of, filed)
                return 1 if reproduction.doubts(asked.source, here) else 0
        else:
            study = Study(load_profile(asked.profile))
            name = filed_under(study.profile.name, changed=False)
            if asked.load:
                load_into(study.store.path, asked.load)
            print(plan_of(study), flush=True)
            study.fetch()
            run_all(notebooks(), {"profile": asked.profile, "source": None}, name)
    except PapermillExecutionError as error:
        if error.ename in _EXPECTED:
            print(error.evalue, file=sys.stderr)
            return 1
        plain = _ANSI.sub("", "\n".join(error.traceback))
        print(
            f"\n{plain}\n\nfailed in cell {error.exec_count}: {error.ename}: {error.evalue}", file=sys.stderr
        )
        return 1
    except DeadKernelError:
        print("the notebook's process died; the machine may be out of memory", file=sys.stderr)
        return 1
    except (ValueError, StoreError, sources.Unavailable, sources.WrongBytes) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, WrongParameter) else 1
    except KeyboardInterrupt:
        print("interrupted; what was computed is stored, the next run goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
