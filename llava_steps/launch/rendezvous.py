"""Connects the launchers of one training.

The first one, the lead, holds the lease of the store entry, and only it writes and seals the entry.
It writes its address to a note in the entry's `.work`. The others read it there, introduce
themselves and wait until all are connected. From then on they are a group (group.py).

Connections are authenticated with a key that only readers of the store know.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError, LockedError, StepError
from llava_steps.launch.address import own_address
from llava_steps.launch.group import POLL, LauncherGroup, Outcome, Peer
from llava_steps.launch.launcher import Launcher
from llava_steps.settings.stage.stage import Stage
from llava_steps.store.lease import Waiting, Watch
from llava_steps.store.store import MANIFEST

NOTE = "nodes.json"
RENDEZVOUS = "LLAVA_STEPS_RENDEZVOUS"
"""Environment variable of workers: URL where they meet."""
LISTENING = "LLAVA_STEPS_LISTENING"
"""Environment variable of rank 0: descriptor of the socket that already listens there, or empty."""
MEET = 600.0
"""Seconds within which all launchers must connect, once the lead has the lease."""
SOON = 30.0
"""Seconds in which the lead usually listens; after that it probably waits for another run."""


def meet(
    stage: Stage,
    launcher: Launcher,
    work: Path,
    again: bool = False,
    waiting: Waiting = lambda holder: None,
) -> LauncherGroup | None:
    """Wait until all launchers are connected; None if the value is sealed meanwhile.

    `again`: replace a value that is already sealed; the lead sets it aside. `waiting` is called
    while another run computes the value, which the lead waits for.

    Raises StepError after `MEET` seconds without all of them, LockedError if another
    launcher has the same number.
    """
    if launcher.count == 1:
        return LauncherGroup(launcher)
    if launcher.leads:
        return _Lead(stage, launcher, work)
    return _join(stage, launcher, work, again, waiting)


class _Lead(LauncherGroup):
    """The first launcher: listens, and waits for all others."""

    def __init__(self, stage: Stage, launcher: Launcher, work: Path) -> None:
        super().__init__(launcher, own_address(stage))
        self._key = secrets.token_bytes(32)
        self._by_index: dict[int, Peer] = {}
        self._lock = threading.Lock()
        try:
            self._listener = Listener(("", stage.rdzv_port), backlog=launcher.count)
            self.socket = socket.create_server(("", stage.master_port), backlog=1024)
        except OSError as error:
            raise ConfigError(
                f"--rdzv-port {stage.rdzv_port}, --master-port {stage.master_port}: "
                f"{error.strerror}; choose other ports, or 0 for free ones"
            ) from None
        self.port = self.socket.getsockname()[1]
        note = {
            "address": self.address,
            "port": self._listener.address[1],
            "key": self._key.hex(),
        }
        path = work / NOTE
        filesystem.write_bytes(path, json.dumps(note).encode(), mode=0o600)
        threading.Thread(target=self._accept, name="nodes", daemon=True).start()
        try:
            self._wait(stage)
        except BaseException as error:
            self.peers = list(self._by_index.values())
            self.__exit__(type(error), error, None)
            raise
        finally:
            path.unlink(missing_ok=True)
            self._listener.close()
        self.peers = [self._by_index[index] for index in sorted(self._by_index)]
        for peer in self.peers:
            peer.say(address=self.address, port=self.port)

    def _wait(self, stage: Stage) -> None:
        until = time.monotonic() + MEET
        while len(self._by_index) < self.launcher.count - 1:
            for peer in list(self._by_index.values()):
                if peer.lost:
                    raise StepError(f"{peer.name} ended before the training began; run again")
            if time.monotonic() > until:
                missing = sorted({*range(1, self.launcher.count)} - self._by_index.keys())
                raise StepError(
                    f"launchers {missing} did not connect within {MEET:.0f} seconds: start them "
                    f"with the same settings, --node {stage.nodes} and their --rank, on the same "
                    "store"
                )
            time.sleep(POLL)

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return  # closed: all are connected
            threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: Connection) -> None:
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            hello = json.loads(connection.recv_bytes(1 << 16))
            index, launch = int(hello["index"]), str(hello["launch"])
            with self._lock:
                if launch != self.launcher.launch:
                    answer: dict[str, Any] = {"later": "another job leads this training"}
                elif index in self._by_index or not 0 < index < self.launcher.count:
                    answer = {"refused": f"launcher {index} is already connected"}
                else:
                    answer = {"welcome": index}
                connection.send_bytes(json.dumps(answer).encode())
                if "welcome" in answer:
                    self._by_index[index] = Peer(connection, f"node {index} ({hello['host']})")
        except (AuthenticationError, OSError, EOFError, ValueError, KeyError):
            connection.close()  # not one of ours


def _join(
    stage: Stage, launcher: Launcher, work: Path, again: bool, waiting: Waiting
) -> LauncherGroup | None:
    begun = time.monotonic()
    until = begun + MEET
    watch = Watch(work)
    sealed = work.parent / MANIFEST
    to_be_replaced = again and sealed.exists()
    while time.monotonic() < until:
        connection = _call(launcher, work)
        if connection is not None:
            peer = Peer(connection, "node 0")
            while "port" not in peer.said:
                if peer.lost or "code" in peer.said:
                    raise Outcome(
                        peer.said.get("code", 1), peer.said.get("message", "it ended")
                    ).error(peer.name)
                time.sleep(POLL)
            group = LauncherGroup(launcher, peer.said["address"], peer.said["port"])
            group.peers = [peer]
            return group
        if not to_be_replaced and sealed.exists():
            return None
        to_be_replaced = to_be_replaced and sealed.exists()
        if watch.held():  # by the lead, or by another run, which the lead waits for
            until = time.monotonic() + MEET
            if time.monotonic() - begun > SOON:
                waiting(watch.holder)
        time.sleep(0.5)
    raise StepError(
        f"the first node did not connect within {MEET:.0f} seconds: start it with the same "
        f"settings, --node {stage.nodes} --rank 0, on the same store as this one"
    )


def _call(launcher: Launcher, work: Path) -> Connection | None:
    """A connection to the lead of the note, accepted by it; None to try again."""
    try:
        note = json.loads((work / NOTE).read_bytes())
        connection = Client((note["address"], note["port"]), authkey=bytes.fromhex(note["key"]))
    except (OSError, EOFError, AuthenticationError, ValueError, KeyError, TypeError):
        return None  # not written yet, or left by an earlier attempt
    hello = {"index": launcher.index, "launch": launcher.launch, "host": socket.gethostname()}
    try:
        connection.send_bytes(json.dumps(hello).encode())
        answer = json.loads(connection.recv_bytes(1 << 16))
    except (OSError, EOFError):
        return None
    if "refused" in answer:
        raise LockedError(f"{work.parent}: {answer['refused']}; wait for it or end it")
    return connection if "welcome" in answer else None
