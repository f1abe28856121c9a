"""What tests beside transformers share: the small model as transformers has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from gguf_files import parsed_once

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)  # two processes with as many threads as cores wait for each other


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_gguf: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with parsed_once():
        model = AutoModelForCausalLM.from_pretrained(
            smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
        )
    assert isinstance(model, torch.nn.Module)
    return model.eval()
