"""A run of the live system, taken again by the state machines that the simulator drives.

`recorded/` was made by `record_run.py`: what router and engines were told, when, and what they
decided. Each event is told again at its time; the same must follow.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.core.errors import ConfigError
from shoal.core.record import Recorder
from shoal.core.request import GenerateRequest, SamplingParams
from shoal.engine.config import EngineConfig
from shoal.engine.events import GrammarReady, Submit, Tick
from shoal.engine.state import EngineState
from shoal.sim.replay import replay

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.jsonl"))
CONFIG = EngineConfig(instance_blocks=(40,), max_model_len=100, vocab_size=50)


def recorded(name: str) -> Path:
    return next(path for path in RECORDED if path.stem == name)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_same_is_decided(path: Path) -> None:
    found = replay(path)
    assert found.difference is None
    assert found.ended is None
    assert found.num_events == len(path.read_text().splitlines()) - 1


def test_much_happened_in_it() -> None:
    entries = [json.loads(line) for path in RECORDED for line in path.read_text().splitlines()]
    rows = [entry for entry in entries if isinstance(entry, list)]
    events = {event[0] for _, event, _ in rows}
    effects = {effect[0] for _, _, found in rows for effect in found}
    assert events >= {"Submit", "Cancel", "StepResult", "Tick", "ReplicaReady", "ReplicaLost"}
    assert effects >= {"RunStep", "Emit", "Send", "CancelAt", "Deliver"}
    # A lost replica's requests went on elsewhere, from their last token.
    sent = [fields for _, _, found in rows for name, fields in found if name == "Send"]
    assert any(fields["request"].get("output_ids") for fields in sent)


def test_another_decision_of_an_engine_is_noticed(tmp_path: Path) -> None:
    lines = recorded("replica-1").read_text().splitlines()
    header = json.loads(lines[0])
    header["config"]["max_num_seqs"] -= 1
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join([json.dumps(header), *lines[1:]]))
    difference = replay(changed).difference
    assert difference is not None
    assert difference.event == "Tick"
    assert difference.recorded == json.loads(lines[difference.line - 1])[2]
    assert difference.decided != difference.recorded


def test_another_decision_of_the_router_is_noticed(tmp_path: Path) -> None:
    lines = recorded("router").read_text().splitlines()
    header = json.loads(lines[0])
    header["config"]["policy"] = "round-robin"
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join([json.dumps(header), *lines[1:]]))
    difference = replay(changed).difference
    assert difference is not None
    assert any(name == "Send" for name, _ in difference.recorded)


def some_run(recorder: Recorder) -> None:
    state = EngineState(CONFIG)
    request = GenerateRequest(
        request_id="r", prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4, seed=1)
    )
    for at, event in enumerate((Submit(request), Tick(), Tick())):
        recorder.note(float(at), event, state.handle(event, float(at)))
    recorder.close()


def test_a_recording_is_bounded_and_says_so(tmp_path: Path) -> None:
    for most_bytes in (400, 1_000_000):
        some_run(Recorder(tmp_path, "some", what="engine", config=CONFIG, most_bytes=most_bytes))
    whole, cut = replay(tmp_path / "some.1.jsonl"), replay(tmp_path / "some.jsonl")
    assert (whole.num_events, whole.ended, whole.difference) == (3, None, None)
    assert cut.num_events < 3
    assert cut.ended is not None
    assert cut.difference is None


@pytest.mark.parametrize("num_lost", [1, 2, 7, 12])
def test_a_recording_whose_last_line_is_cut_is_taken_up_to_there(
    tmp_path: Path, num_lost: int
) -> None:
    """Its writer was killed, or the disk was full."""
    some_run(Recorder(tmp_path, "some", what="engine", config=CONFIG))
    path = tmp_path / "some.jsonl"
    path.write_text(path.read_text().removesuffix("\n")[:-num_lost])
    found = replay(path)
    assert (found.num_events, found.difference) == (2, None)
    assert found.ended == "its last line is cut off"


def test_what_cannot_be_written_ends_a_recording(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "some", what="engine", config=CONFIG)

    class Matcher:
        def mask(self) -> bytes:
            return b""

        def advance(self, token_id: int) -> bool:
            return token_id > 0

    recorder.note(0.0, GrammarReady("r", Matcher()), [])
    some_run(recorder)
    found = replay(tmp_path / "some.jsonl")
    assert (found.num_events, found.ended) == (0, "a Matcher cannot be recorded")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"shoal": "engine", "version": 99}', "x"])
def test_what_is_no_recording(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"some\.jsonl is no recording that this version reads"):
        replay(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full here")
def test_a_full_disk_ends_a_recording_and_nothing_else(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "some", what="engine", config=CONFIG)
    recorder._file.close()
    recorder._file = open("/dev/full", "w", encoding="utf-8", buffering=1)  # noqa: SIM115, PTH123
    some_run(recorder)
    assert recorder._file.closed


def test_a_recording_that_cannot_begin_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"nothing can be recorded in .*name another"):
        Recorder(tmp_path / "file", "some", what="engine", config=CONFIG)
