"""SDE objects: equations of the literature, with what is known of their solutions."""

from sdesolve.models.langevin import UnderdampedLangevin

__all__ = ["UnderdampedLangevin"]
