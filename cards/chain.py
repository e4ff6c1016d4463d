"""The chain of licences from what a model was made of, and what it means in plain words."""

from __future__ import annotations

from .formats import cell
from .licences import forbids_derivatives
from .view import View

__all__ = ["licence_chain", "licence_words"]

_UNKNOWN = "not known"
# What must be known before use; a text about terms, never a replacement for them.
_TERMS = (("nc", "no commercial use"), ("sa", "derived works under the same licence"), ("by", "name the authors"))


def _terms(licence: str | None) -> str:
    if not licence:
        return "find it out before you share this model"
    name = licence.lower()
    if forbids_derivatives(licence):
        return "forbids publishing derived works"
    if name.startswith("cc-"):
        return ", ".join(words for part, words in _TERMS if part in name.split("-")) or "see its text"
    if name in ("apache-2.0", "mit", "isc", "bsd-2-clause", "bsd-3-clause"):
        return "derived works allowed; keep its notices"
    if name.startswith(("gpl", "agpl", "lgpl")):
        return "derived works under the same licence"
    return "terms of its own: read them"


def licence_chain(view: View) -> list[list[str]]:
    """[part, what, licence, what it asks for], from the first ancestor that is known to this model."""
    rows = []
    if view.kind == "converted":
        for name in view.teacher.get("derived_from") or []:
            rows.append(["the teacher was made from", cell(name), _UNKNOWN, "see its card"])
        licence = view.teacher.get("licence")
        what = f"{cell(view.teacher_name)} at {view.teacher_revision()}"
        rows.append(["teacher", what, licence or _UNKNOWN, _terms(licence)])
    elif view.kind == "adapter" or view.origin:
        source = view.base_id or view.origin.get("source") or view.adapter.get("base_name")
        licence = view.origin.get("licence") or view.adapter.get("licence")
        rows.append(["made from", cell(source), licence or _UNKNOWN, _terms(licence)])
    for name in view.dataset_ids():
        rows.append(["data", cell(name), _UNKNOWN, "see its card"])
    own = view.licence
    rows.append(["this model", cell(view.name), own or "not stated", _terms(own) if own else "ask its publisher"])
    return rows


def licence_words(view: View) -> str:
    """What the chain comes to, as sentences."""
    source = view.teacher if view.kind == "converted" else (view.origin or view.adapter)
    name = view.teacher_name if view.kind == "converted" else (view.base_id or "what it was made from")
    stated = [str(source[key]) for key in ("licence", "licence_name") if source.get(key)]
    forbidding = next((licence for licence in stated if forbids_derivatives(licence)), None)
    if forbidding:
        if view.publish.get("permission") is True:
            return (
                f"The licence of {name}, {forbidding}, forbids publishing what is derived from it. Whoever published "
                "this model stated that its owner gave them permission; that permission does not pass on to you."
            )
        return (
            f"The licence of {name}, {forbidding}, forbids publishing what is derived from it: this model may be used "
            "where it was made, and not be shared. `rnnzoo push` refuses it."
        )
    if view.kind == "converted":
        if view.teacher.get("licence"):
            return f"The teacher's licence is {view.teacher['licence']}; it applies to this model too."
        return "The teacher's licence is not known to the converter: find it out before you share this model."
    if view.kind == "trained":
        if view.publish.get("licence"):
            return f"Its publisher gives this model under {view.publish['licence']}."
        return "Not stated: it is yours to choose, as far as the licence of the training text lets you."
    if view.licence:
        return f"The licence is {view.licence}; it applies to this form of the weights too."
    return "The licence of the weights is not known here: find it out before you share this model."
