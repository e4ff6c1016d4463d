"""Draws the pictures of docs/assets, each for light and for dark pages: concepts, and the README's plot.

    python scripts/make_pictures.py [--out DIR] [--png]

The plot's numbers are read from the tables of docs/results.md, and written into its file as its description.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from site_pictures import concepts, paths, results

from rnnzoo.cards.style import DARK, LIGHT

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
CONCEPTS = {name: getattr(part, name) for part in (concepts, paths) for name in part.__all__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets")
    parser.add_argument("--png", action="store_true", help="PNG on the pages' colours, to look at")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = results.numbers(PAGE)
    for theme in (LIGHT, DARK):
        for name, draw in CONCEPTS.items():
            _save(draw(theme), options.out / f"{name}-{theme.name}", theme, options.png)
        _save(results.draw(theme, data), options.out / f"result-{theme.name}", theme, options.png, data)


def _save(drawing: Any, stem: Path, theme: Any, png: bool, data: Any = None) -> None:
    import matplotlib

    if png:
        drawing.patch.set_alpha(1)
        drawing.savefig(f"{stem}.png", dpi=110, facecolor=theme.paper)
        return
    # No date and fixed names inside: the same numbers give the same file.
    about = {"Date": None, "Creator": None, "Description": json.dumps(data) if data else None}
    with matplotlib.rc_context({"svg.hashsalt": "rnnzoo"}):
        drawing.savefig(f"{stem}.svg", transparent=True, metadata=about)
    path = Path(f"{stem}.svg")
    path.write_text(re.sub(r"[ \t]+$", "", path.read_text(), flags=re.MULTILINE))


if __name__ == "__main__":
    main()
