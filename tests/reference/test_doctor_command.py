"""`shoal doctor` on the machine that runs the tests: facts that can be known otherwise."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from shoal.cli.main import main
from shoal.doctor.report import read_report
from shoal.kernels.cpu import library


def test_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NCCL_PROTO", "LL")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["shoal", "doctor", "--json", "--port", str(port)])
        with pytest.raises(SystemExit):
            main()
    report = json.loads(capsys.readouterr().out)
    found = {each["check"]: each for each in report["findings"]}
    assert found["nccl tuning"]["found"] == "NCCL_PROTO=LL"
    assert f"port {port}" in found["port"]["found"] and found["port"]["status"] == "warn"
    assert sum(report["counts"].values()) == len(report["findings"])
    try:
        isa = library.load_library().shoal_cpu_best_isa()
    except OSError:
        isa = None
    assert found["cpu kernels"]["status"] == ("ok" if isa else "warn")
    (tmp_path / "report.json").write_text(json.dumps(report))
    facts = read_report(tmp_path / "report.json")
    assert facts.software.torch == torch.__version__
    assert facts.processor.num_cpus == len(os.sched_getaffinity(0))
    assert facts.name == socket.gethostname()
