"""The last part of a save, in parallel to the training if configured: digests, flushing, marker.

When the ranks have written their files, rank 0 reads them for their digests and flushes them to
the disk; the training need not wait for that. As always, the marker is written last, then the
directory gets its name.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Commits:
    """Commits one checkpoint at a time: at once, or with `beside` in a separate thread.

    A context manager; leaving it waits for the current commit.
    """

    def __init__(self, beside: bool = False) -> None:
        self._thread = ThreadPoolExecutor(1, "commit") if beside else None
        self._open: Future[None] | None = None

    def begin(self, commit: Callable[[], None]) -> None:
        """Commit a checkpoint, after the one before it. Raises what `finish` raises."""
        self.finish()
        if self._thread is None:
            commit()
        else:
            self._open = self._thread.submit(commit)

    def finish(self) -> None:
        """Wait until nothing is being committed. Raises what the commit raised."""
        if self._open is not None:
            done, self._open = self._open, None
            done.result()

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.finish()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"and the last checkpoint could not be committed: {failed}")
        if self._thread is not None:
            self._thread.shutdown()
