"""Workloads: every trace format, malformed rows named, and the transformations."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from shoal.core.errors import ConfigError
from shoal.core.workload import Arrival, Workload, parse_workload, poisson_workload, read_workload


def parse(text: str, seed: int = 0) -> Workload:
    return parse_workload("trace", text.splitlines(keepends=True), Random(seed))


def shape(workload: Workload) -> list[tuple[float, int, int]]:
    return [(round(a.arrival_s, 6), a.prompt_tokens, a.output_tokens) for a in workload.arrivals]


def test_azure() -> None:
    workload = parse(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 23:59:59.5000000,374,44\r\n"
        "2023-11-17 00:00:01.7500000,396,109\r\n"
    )
    assert shape(workload) == [(0.0, 374, 44), (2.25, 396, 109)]


def test_azure_2024_has_an_offset() -> None:
    workload = parse(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 02:00:01+02:00,2399,6\n"
    )
    assert shape(workload) == [(0.0, 2162, 5), (0.99007, 2399, 6)]


def test_servegen_with_a_column_that_is_not_needed() -> None:
    workload = parse("timestamp_s,input_tokens,output_tokens,client_id\n5.5,425,693,23\n6,1,2,23\n")
    assert shape(workload) == [(0.0, 425, 693), (0.5, 1, 2)]


def test_mooncake_is_spread_over_its_ticks() -> None:
    rows = "".join(
        f'{{"timestamp": {tick}, "input_length": 900, "output_length": 7, "hash_ids": [0, {i}]}}\n'
        for tick in (0, 3000)
        for i in range(50)
    )
    workload = parse(rows)
    times = [arrival.arrival_s for arrival in workload.arrivals]
    assert times == sorted(times)
    assert times[0] == 0.0
    assert len(set(times)) == 100
    assert 5.0 < times[-1] < 6.0
    assert sum(time < 3 for time in times) == pytest.approx(50, abs=3)
    assert {a.block_hashes[0] for a in workload.arrivals} == {0}
    assert parse(rows) == workload
    assert parse(rows, seed=1) != workload


@pytest.mark.parametrize(
    "times", [[0, 0, 40, 277], [0, 3000, 6000], [500, 500, 500], [0, 3000, 3000, 4000]]
)
def test_mooncake_s_times_stay_where_they_are_told_finely(times: list[int]) -> None:
    """As in its synthetic trace, and in those of others who took up its format."""
    rows = (f'{{"timestamp": {t}, "input_length": 9, "output_length": 7}}\n' for t in times)
    found = [arrival.arrival_s for arrival in parse("".join(rows)).arrivals]
    assert found == [(each - times[0]) / 1000 for each in times]


def test_tables_as_other_tools_write_them() -> None:
    """With quotes, a column of numbers, and counts as floats, since a row once lacked them."""
    quoted = '\ufeff"","TIMESTAMP","ContextTokens","GeneratedTokens"\r\n'
    rows = '"0","2023-11-16 18:15:46.5","374.0","44"\r\n"1","2023-11-16 18:15:47","3","9.0"\r\n'
    assert shape(parse(quoted + rows)) == [(0.0, 374, 44), (0.5, 3, 9)]
    spaced = ' {"arrival_s": 0, "prompt": "x", "prompt_tokens": null, "output_tokens": 2.0}\n'
    assert shape(parse(spaced)) == [(0.0, 0, 2)]
    assert parse(OWN.replace("1}", '1, "hash_ids": null}')).arrivals[0].block_hashes == ()


def test_our_own_format() -> None:
    workload = parse(
        '{"arrival_s": 1.5, "prompt_tokens": 12, "output_tokens": 3}\n'
        "\n"
        '{"arrival_s": 1.0, "prompt": "Why?", "output_tokens": 4}\n'
    )
    assert workload.arrivals == (
        Arrival(arrival_s=0.0, prompt_tokens=0, output_tokens=4, prompt="Why?"),
        Arrival(arrival_s=0.5, prompt_tokens=12, output_tokens=3),
    )


CSV = "timestamp_s,input_tokens,output_tokens\n"
OWN = '{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no arrivals"),
        (CSV, "holds no arrivals"),
        ("a,b\n1,2\n", "fields a,b"),
        ('{"a": 1}\n', "fields a"),
        (CSV + "0,1,1\n0.5,1\n", "line 3: not the 3 fields"),
        (CSV + "0,1,1,1\n", "line 2: not the 3 fields"),
        (CSV + "0,1,1\n1,x,1\n", "line 3: invalid literal"),
        (CSV + "0,0,1\n", "line 2: prompt of 0 tokens"),
        (CSV + "0,1,-1\n", "line 2: output of -1 tokens"),
        (CSV + "nan,1,1\n", "line 2: arrival is at nan s"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "line 2: TIMESTAMP is"),
        (OWN + "{\n", "line 2: not JSON"),
        (OWN + "[1]\n", "line 2: not a JSON object"),
        (OWN + '\n{"arrival_s": 0, "output_tokens": 1}\n', "line 3: no 'prompt_tokens'"),
        (OWN + '{"arrival_s": 0, "prompt": 5, "output_tokens": 1}\n', "line 2: prompt is 5"),
        (OWN + '{"arrival_s": null, "prompt": "", "output_tokens": 1}\n', "line 2: float"),
        (OWN + OWN.replace("1,", "Infinity,"), "line 2: cannot convert float infinity"),
        (OWN + OWN.replace("1,", "1e999,"), "line 2: cannot convert float infinity"),
        (OWN + OWN.replace("1,", "9" * 400 + ","), "prompt of more than 2,147,483,647 tokens"),
        (OWN + OWN.replace("1,", "9" * 5000 + ","), "line 2: not JSON"),
        (OWN + OWN.replace("0,", "9" * 400 + ","), "line 2: int too large"),
        (OWN + OWN.replace("0,", "1e12,"), "line 2: arrival is at 1000000000000.0 s"),
        (OWN + OWN.replace("1}", "3000000000}"), "line 2: output of more than"),
        (OWN + OWN.replace("0,", "[" * 100_000 + ","), "line 2: not JSON"),
        (OWN + OWN.replace("1}", '1, "hash_ids": [1e999]}'), "line 2: cannot convert"),
        (CSV + '"0,1,1\n' + "1,1,1\n" * 30_000, "field larger than field limit (131072)"),
        (CSV + "0,1,1\n1," + "x" * 1000 + ",1\n", "line 3: invalid literal"),
        (CSV + "0,1.5,1\n", "line 2: 1.5 tokens; it must be a whole number"),
        ("x" * 200_000 + "\n", "its header is no CSV (field larger"),
        ("[" + OWN + "]", "line 1: not JSON"),
        (OWN + OWN.replace("1}", '1, "hash_ids": "12"}'), "line 2: hash_ids is '12'"),
        (OWN.replace('s": 1,', 's": -5, "prompt": "a",'), "line 1: prompt of -5 tokens"),
    ],
)
def test_a_malformed_trace_names_file_and_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="trace") as caught:
        parse(text)
    assert message in str(caught.value)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "one.csv"
    path.write_text("\ufeff" + CSV + "3,1,2\n", encoding="utf-8")
    assert shape(read_workload(path, Random(0))) == [(0.0, 1, 2)]
    assert read_workload(path, Random(0)).name == "one.csv"
    with pytest.raises(ConfigError, match="No such file"):
        read_workload(tmp_path / "absent.csv", Random(0))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"one\.csv is not UTF-8"):
        read_workload(path, Random(0))


def test_transformations() -> None:
    workload = parse(CSV + "0,100,10\n4,5,99\n6,50,50\n")
    assert workload.duration_s == 6.0
    assert shape(workload.stretched(0.5)) == [(0.0, 100, 10), (2.0, 5, 99), (3.0, 50, 50)]
    clipped = workload.clipped(max_prompt_tokens=60, max_output_tokens=20)
    assert shape(clipped) == [(0.0, 60, 10), (4.0, 5, 20), (6.0, 50, 20)]
    assert shape(workload.first(2)) == shape(workload)[:2]
    with pytest.raises(ConfigError, match="time scale is 0"):
        workload.stretched(0)


def test_poisson_has_the_rate_and_the_spread_of_one() -> None:
    workload = poisson_workload(
        rate_per_s=20.0, num_requests=5000, lengths=[(10, 1), (20, 2)], rng=Random(1)
    )
    gaps = [
        b.arrival_s - a.arrival_s
        for a, b in zip(workload.arrivals, workload.arrivals[1:], strict=False)
    ]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert workload.arrivals[0].arrival_s == 0.0
    assert mean == pytest.approx(1 / 20, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.1)
    assert {(a.prompt_tokens, a.output_tokens) for a in workload.arrivals} == {(10, 1), (20, 2)}
    with pytest.raises(ConfigError, match="rate is 0"):
        poisson_workload(rate_per_s=0, num_requests=1, lengths=[(1, 1)], rng=Random(0))
