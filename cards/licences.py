"""Licence identifiers of the Hub, offline."""

from __future__ import annotations

import re
from typing import Any

from ..kernels.errors import RnnzooError

__all__ = ["HUB_LICENCES", "forbids_derivatives", "hub_licence", "may_publish"]

_NAMES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl
    apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3
    llama4 grok2-community gemma unknown other"""
HUB_LICENCES = frozenset(_NAMES.split())


def hub_licence(name: str | None) -> dict[str, str]:
    """The metadata for a licence as the teacher states it: `license`, and `license_name` where the Hub has no name."""
    if not name:
        return {"license": "unknown"}
    identifier = name.strip().lower().replace(" ", "-")
    if identifier in HUB_LICENCES:
        return {"license": identifier}
    return {"license": "other", "license_name": identifier}


def forbids_derivatives(licence: str | None) -> bool:
    """Whether a licence, in any common spelling, lets nobody publish what was made from the work: the ND ones of
    Creative Commons (cc-by-nd-4.0, "CC BY-NC-ND 3.0", creativecommons.org/licenses/by-nd/4.0, ...)."""
    spelled = re.sub(r"[^a-z]+", "-", (licence or "").lower()) + "-"
    return re.search(r"(^|-)(nd|no-?deriv(ative)?s?)-", spelled) is not None


def may_publish(results: dict[str, Any] | None, permission: bool = False) -> bool:
    """Whether a model may go to the Hub by the licence of what it was made from.

    Args:
        results: results.json as read; `publish: {"permission": true}` in it says that permission was given.
        permission: the publisher says so now.
    Returns:
        True where permission is what allows it (it belongs into results.json, and the card says so); False where the
        licence itself does not forbid it, or says nothing.
    Raises:
        RnnzooError: the licence forbids derivatives and there is no permission.
    """
    parts = ((results or {}).get(part) for part in ("teacher", "import", "adapter"))
    teacher = next((part for part in parts if part), {})
    stated = [str(teacher.get(key) or "") for key in ("licence", "licence_name")]
    forbidding = next((licence for licence in stated if forbids_derivatives(licence)), None)
    if forbidding is None:
        return False
    if permission or ((results or {}).get("publish") or {}).get("permission") is True:
        return True
    name = teacher.get("base_model") or teacher.get("name") or teacher.get("source") or "the teacher"
    raise RnnzooError(
        f"The licence of {name}, {forbidding}, forbids publishing what is derived from it; if its owner permitted you "
        "to, say so with --i-have-permission, and the card will say it too."
    )
