"""What `shoal route` makes of its flags: addresses, keys, names, expected speeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.cli.upstreams import read_names, read_upstreams
from shoal.core.errors import ConfigError
from shoal.core.stats import EngineInfo
from shoal.router.upstream.checks import CheckError, Found
from shoal.router.upstream.door import Door

URL = "http://a:8000"
INFO = EngineInfo(
    max_model_len=10,
    num_kv_blocks=1,
    max_num_seqs=1,
    max_num_batched_tokens=1,
    max_waiting=1,
    device="upstream",
    dtype="",
)


def found(*names: str, is_one_model: bool = True) -> Found:
    return Found(names, is_one_model, None, INFO)


def test_devices_tell_how_fast_upstreams_are_beside_each_other() -> None:
    named = [f"{URL}=H100", "http://b=L4,L4", "http://c=L4", "http://d"]
    h100, two, one, unknown = (each.speed for each in read_upstreams(named, []))
    assert unknown is None
    assert h100 is not None
    assert two is not None
    assert one is not None
    assert h100.step_s < two.step_s < one.step_s
    assert one.token_s == pytest.approx(2 * two.token_s)


def test_keys_come_from_files_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-file\n")
    upstreams = read_upstreams(
        [URL, "http://b:1", "http://c:1"],
        [f"{URL}/v1={file}", "env:ALL", "http://c:1=env:C"],
        {"ALL": "sk-all", "C": "sk-c"},
    )
    assert [each.address.key for each in upstreams] == ["sk-file", "sk-all", "sk-c"]
    assert "sk-" not in repr(upstreams)


@pytest.mark.parametrize(
    ("named", "keys", "complaint"),
    [
        ([URL, f"{URL}/v1"], [], "twice"),
        ([URL], ["http://other=env:KEY"], "no --upstream"),
        ([URL], ["env:MISSING"], "MISSING is not set"),
        ([URL], ["sk-the-key-itself"], "names a file"),
        ([f"{URL}=NoSuchDevice"], [], "NoSuchDevice"),
    ],
)
def test_flags_that_make_no_sense(named: list[str], keys: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as refused:
        read_upstreams(named, keys, {"KEY": "k"})
    assert "sk-the-key" not in str(refused.value)


def test_names() -> None:
    assert read_names(["a", "a=b", "c=d=e"]) == [("a", "a"), ("a", "b"), ("c", "d=e")]
    for wrong in ("=b", "a="):
        with pytest.raises(ConfigError, match="lacks a name"):
            read_names([wrong])


def test_a_door_takes_its_names_from_the_first_upstream() -> None:
    door = Door()
    assert door.admit(found("big", "alias")) == {"big": "big", "alias": "alias"}
    assert door.names == ("big", "alias")
    assert door.admit(found("alias")) == {"big": "alias", "alias": "alias"}
    with pytest.raises(CheckError, match="--model-name big=other"):
        door.admit(found("other"))


def test_several_models_behind_one_upstream_need_a_name() -> None:
    with pytest.raises(CheckError, match="--model-name"):
        Door().admit(found("one", "two", is_one_model=False))
    named = Door([("public", "two")])
    assert named.admit(found("one", "two", is_one_model=False)) == {"public": "two"}
