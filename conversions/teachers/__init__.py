"""Teachers: the pretrained Transformers to convert, from the Hub, a folder, a GGUF file, or the embedded one."""

from __future__ import annotations

from .families import FAMILIES, Family
from .files import cache_root, hub_reachable
from .resolve import TeacherRef, resolve_teacher

__all__ = ["FAMILIES", "Family", "TeacherRef", "cache_root", "hub_reachable", "resolve_teacher"]
