"""Progress bars that cost nothing, and hold no lock, unless they are shown."""

from __future__ import annotations

from typing import Any, final


@final
class _Hidden:
    """A bar that nobody sees."""

    def __enter__(self) -> _Hidden:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: float = 1) -> None:
        pass

    def set_postfix(self, *_: object, **__: object) -> None:
        pass


def progress_bar(shown: bool, **options: Any) -> Any:
    """A bar of tqdm, a context manager with ``update``.

    One that is hidden is none of tqdm's: those share a lock with all processes that were forked from this one, and a
    worker that is killed while it holds the lock would stop its siblings.

    Args:
        shown: whether there is one.
        options: of ``tqdm``.
    """
    if not shown:
        return _Hidden()
    from tqdm import tqdm  # not with the package: few runs show one

    return tqdm(**options)
