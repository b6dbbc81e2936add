"""The launchers of one training, connected: they begin and end together.

Each pair keeps a connection. A launcher that fails reports it to the lead, the lead to all. One
that is killed, or whose machine is lost, is noticed by its closed connection, or by `LOST` seconds
without a sign of life. Messages are JSON.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from llava_steps.core.errors import BY_CODE, StepError
from llava_steps.launch.launcher import Launcher

BEAT = 5.0
"""Seconds between signs of life."""
LOST = 40.0
"""Seconds of silence after which another launcher counts as lost."""
POLL = 0.05
"""Seconds between two checks whether the others have ended."""


class LostError(StepError):
    """Another launcher was killed, or its machine is lost."""


class Peer:
    """A connection to another launcher: sends signs of life, and notices when they stop."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.name = name
        self.said: dict[str, Any] = {}
        """The latest value of each key that the other launcher sent."""
        self.lost = False
        self._connection = connection
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name=name, daemon=True)
        self._thread.start()

    def say(self, **what: Any) -> None:
        """Send, unless the other launcher is gone."""
        with self._sending, suppress(OSError):
            self._connection.send_bytes(json.dumps(what).encode())

    def _listen(self) -> None:
        heard = beat = time.monotonic()
        try:
            while True:
                now = time.monotonic()
                if now - beat >= BEAT:
                    self.say()
                    beat = now
                if self._connection.poll(BEAT / 2):
                    self.said |= json.loads(self._connection.recv_bytes(1 << 20))
                    heard = time.monotonic()
                elif now - heard > LOST:
                    break
        except (OSError, EOFError, ValueError):
            pass  # closed, or reset: the same as silence
        self.lost = True


@dataclass(frozen=True)
class Outcome:
    """How the part of a launcher ended; code 0: without error."""

    code: int
    message: str = ""

    def error(self, where: str) -> StepError:
        """The StepError of this outcome."""
        return BY_CODE.get(self.code, StepError)(f"{where}: {self.message}")


class LauncherGroup:
    """The launchers of one training; a context manager that lasts until the value is sealed.

    Leaving it reports to the others that all is done, or the error.
    """

    def __init__(self, launcher: Launcher, address: str = "", port: int = 0) -> None:
        self.launcher = launcher
        self.address = address
        """Host of rank 0."""
        self.port = port
        """Port where all processes connect; 0 without other launchers."""
        self.socket: socket.socket | None = None
        """The lead's: listens at `port` already, for rank 0 to take over."""
        self.peers: list[Peer] = []
        """The lead's: all others; of another launcher: the lead."""
        self._reported = False

    def others_failed(self) -> StepError | None:
        """The error that another launcher reported, or its loss; None if there is neither."""
        for peer in self.peers:
            if peer.said.get("code"):
                return Outcome(peer.said["code"], peer.said["message"]).error(peer.name)
        for peer in self.peers:
            if peer.lost and not peer.said.keys() & {"code", "sealed"}:
                return LostError(
                    f"{peer.name} is gone: its launcher was killed or its machine is lost; run "
                    "again to resume from the last checkpoint"
                )
        return None

    def done(self) -> None:
        """Wait for the others after all workers of this launcher ended; raises if one failed.

        The lead returns once all are done, the others once the value is sealed.
        """
        wanted = "code" if self.launcher.leads else "sealed"
        for peer in self.peers:
            if not self.launcher.leads:
                peer.say(code=0, message="")
        while (error := self.others_failed()) is None:
            if all(wanted in peer.said for peer in self.peers):
                return
            time.sleep(POLL)
        raise error

    def report(self, error: BaseException) -> None:
        """End the others too, for this reason; the first one reported counts."""
        if not self._reported:
            self._reported = True
            for peer in self.peers:
                peer.say(code=getattr(error, "exit_code", 1), message=str(error))

    def __enter__(self) -> LauncherGroup:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.socket is not None:
            self.socket.close()
        if error is not None:
            self.report(error)
        elif self.launcher.leads:
            for peer in self.peers:
                peer.say(sealed=True)
