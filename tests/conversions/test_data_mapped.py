"""Packed rows of a file are mapped: what a process does not ask for is not in its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rnnzoo.conversions.data import PackedTokens, TextHashes

SCRIPT = """
import sys
from pathlib import Path
from rnnzoo.conversions.data import PackedTokens

def resident():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024

before = resident()
rows = PackedTokens.load(sys.argv[1]).rows(7, 12000)
for i in range(0, 12000, 6000):
    rows[i]
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_rows_of_a_file_are_read_when_they_are_asked_for(tmp_path):
    ids = torch.arange(12_100 * 1024, dtype=torch.int32).view(12_100, 1024)  # 99 MB with the ids of documents
    PackedTokens(ids, torch.zeros_like(ids), "test", TextHashes("test")).save(tmp_path / "rows.safetensors")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "rows.safetensors")], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 25_000_000


def test_rows_begin_again_where_they_end_and_are_the_same_rows_either_way(tmp_path):
    ids = torch.arange(10 * 4, dtype=torch.int32).view(10, 4)
    rows = PackedTokens(ids, torch.zeros_like(ids), "test", TextHashes("test"))
    assert torch.equal(rows.rows(3, 5).input_ids, ids[3:8])
    assert torch.equal(rows.rows(13, 5).input_ids, ids[3:8])
    assert torch.equal(rows.rows(8, 5).input_ids, torch.cat([ids[8:], ids[:3]]))
    rows.save(tmp_path / "rows.safetensors")
    assert PackedTokens.load(tmp_path / "rows.safetensors").sha256 == rows.sha256
