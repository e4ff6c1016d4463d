"""Energy and CO2 of a run, by CodeCarbon (extra `energy`), without the network: the country is named by the user.

A run that is stopped and goes on adds to what it has used; a killed one loses what it used since it was started.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..kernels.errors import RnnzooError
from ..kernels.files import object_or_nothing, replace_text

__all__ = ["check_energy", "energy_record", "measured_energy"]

FILE = "energy.json"


def check_energy(country: str | None) -> None:
    """Refuses what could not be measured, before any work is done.

    Raises:
        RnnzooError: CodeCarbon is not installed, or knows no power grid of that country.
    """
    if country is None:
        return
    if importlib.util.find_spec("codecarbon") is None:
        raise RnnzooError("Measuring energy needs CodeCarbon: pip install 'rnnzoo[energy]', or leave --energy out.")
    from codecarbon.input import DataSource

    if country.upper() not in DataSource().get_global_energy_mix_data():
        raise RnnzooError(
            f"--energy is {country!r}; expected the ISO code of a country in three letters, such as DEU or USA."
        )


def energy_record(folder: Path) -> dict[str, Any] | None:
    """{energy_kwh, emissions_kg, seconds, country, source} of a run so far; None: it was not measured."""
    return object_or_nothing(folder / FILE) or None


@contextlib.contextmanager
def measured_energy(country: str | None, folder: Path) -> Iterator[None]:
    """Adds what the block uses to `folder`/energy.json, also where it ends in an error; None: does nothing."""
    if country is None:
        yield
        return
    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(
        country_iso_code=country.upper(),
        tracking_mode="process",
        save_to_file=False,
        allow_multiple_runs=True,
        log_level="error",
    )
    started = time.monotonic()
    tracker.start()
    try:
        yield
    finally:
        emitted = tracker.stop()
        before = energy_record(folder) or {}
        record = {
            "energy_kwh": before.get("energy_kwh", 0.0) + float(tracker.final_emissions_data.energy_consumed),
            "emissions_kg": before.get("emissions_kg", 0.0) + float(emitted or 0.0),
            "seconds": round(before.get("seconds", 0.0) + time.monotonic() - started, 1),
            "country": country.upper(),
            "source": f"CodeCarbon {version('codecarbon')}",
        }
        replace_text(folder / FILE, json.dumps(record, indent=1) + "\n")
