"""Energy and CO2: measured where CodeCarbon is and a country is named, added up over restarts, off otherwise."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import json
import sys
import types

import pytest

from rnnzoo import cli
from rnnzoo.conversions import energy
from rnnzoo.conversions.energy import check_energy, energy_record, measured_energy
from rnnzoo.kernels.errors import RnnzooError

from ..end_to_end.conftest import write_documents


@pytest.fixture
def codecarbon(monkeypatch):
    """A stand-in with numbers that nobody measured: 2 Wh and 1 g for each block."""

    class Tracker:
        def __init__(self, country_iso_code, **options):
            assert country_iso_code == "DEU" and options["save_to_file"] is False

        def start(self):
            self.final_emissions_data = None

        def stop(self):
            self.final_emissions_data = types.SimpleNamespace(energy_consumed=0.002)
            return 0.001

    package, source = types.ModuleType("codecarbon"), types.ModuleType("codecarbon.input")
    package.__spec__ = importlib.machinery.ModuleSpec("codecarbon", None)
    package.OfflineEmissionsTracker = Tracker
    source.DataSource = lambda: types.SimpleNamespace(get_global_energy_mix_data=lambda: {"DEU": {}})
    monkeypatch.setitem(sys.modules, "codecarbon", package)
    monkeypatch.setitem(sys.modules, "codecarbon.input", source)
    monkeypatch.setattr(energy, "version", lambda name: "0")


def test_what_a_block_uses_is_added_to_what_was_used_before(codecarbon, tmp_path):
    with measured_energy("deu", tmp_path):
        pass
    with pytest.raises(KeyboardInterrupt), measured_energy("deu", tmp_path):
        raise KeyboardInterrupt
    record = energy_record(tmp_path)
    assert record is not None and record.pop("seconds") >= 0
    assert record == {"energy_kwh": 0.004, "emissions_kg": 0.002, "country": "DEU", "source": "CodeCarbon 0"}


def test_without_a_country_nothing_is_measured(tmp_path):
    with measured_energy(None, tmp_path):
        pass
    assert energy_record(tmp_path) is None and not list(tmp_path.iterdir())


def test_an_unknown_country_is_refused(codecarbon):
    check_energy("deu")
    with pytest.raises(RnnzooError, match="three letters"):
        check_energy("Germany")


def test_a_missing_package_is_told_before_any_work(monkeypatch, tmp_path, capsys):
    find = energy.importlib.util.find_spec
    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: None if name == "codecarbon" else find(name))
    data = str(write_documents(tmp_path / "text.jsonl", 40))
    for command in (["train", "--arch", "supra", "--data", data], ["convert", "embedded"]):
        assert cli._run([*command, "--out", str(tmp_path / "out"), "--energy", "DEU", "--quiet"]) == 1
        assert "pip install 'rnnzoo[energy]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_training_with_energy_says_so_on_its_card(codecarbon, tmp_path):
    data, out = str(write_documents(tmp_path / "text.jsonl", 40)), tmp_path / "out"
    small = ["--hidden-size", "16", "--layers", "1", "--set", "head_dim=8", "--context", "32", "--steps", "2"]
    command = ["train", "--arch", "supra", "--data", data, *small, "--no-evaluate", "--quiet", "--energy", "DEU"]
    assert cli._run([*command, "--out", str(out)]) == 0
    assert json.loads((out / "results.json").read_text())["training"]["energy"]["energy_kwh"] == 0.002
    text = (out / "README.md").read_text()
    assert "| CO2 equivalents | 1 g |" in text and "training_type: pre-training" in text and "(kind: trained)" in text
    assert cli._run([*command, "--out", str(out)]) == 0  # finished: nothing is added
    assert json.loads((out / "results.json").read_text())["training"]["energy"]["energy_kwh"] == 0.002


def test_the_real_package_measures(tmp_path):
    pytest.importorskip("codecarbon")
    check_energy("FRA")
    with measured_energy("FRA", tmp_path):
        sum(range(5_000_000))
    record = energy_record(tmp_path)
    assert record is not None and record["energy_kwh"] > 0 and record["emissions_kg"] > 0
    assert record["source"] == f"CodeCarbon {importlib.metadata.version('codecarbon')}"
