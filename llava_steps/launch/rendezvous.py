"""The launchers of one training find each other, and begin and end together.

Each node runs a launcher (or each process, where torchrun or srun starts one for every GPU). The
first one, the lead, holds the lease of the store entry and is the only one to write and seal it.
It leaves a note in the entry's `.work` that says where it listens; the others read it there, say
who they are and wait until all have come. From then on each pair keeps a connection. A launcher
that fails tells the lead, the lead tells all; one that is killed, or whose machine is lost, is
noticed by its closed connection, or by `LOST` seconds without a sign of life.

Messages are JSON; connections are authenticated with a key that only readers of the store know.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
)
from pathlib import Path
from types import TracebackType
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import BY_CODE, ConfigError, LockedError, StepError
from llava_steps.settings.stage.stage import Stage
from llava_steps.store.store import MANIFEST

NOTE = "nodes.json"
RENDEZVOUS = "LLAVA_STEPS_RENDEZVOUS"
"""Environment variable of workers: URL at which they meet."""
LISTENING = "LLAVA_STEPS_LISTENING"
"""Environment variable of rank 0: descriptor of the socket that listens there already, or empty."""
BEAT = 5.0
"""Seconds between signs of life."""
LOST = 40.0
"""Seconds of silence after which another launcher counts as lost."""
MEET = 600.0
"""Seconds in which all launchers must have come."""
POLL = 0.05


@dataclass(frozen=True)
class Place:
    """Which of the job's processes this launcher starts."""

    index: int
    """Number of this launcher; 0 leads."""
    count: int
    """Launchers in all."""
    first: int
    """Rank of its first worker."""
    workers: int
    """Workers that it starts."""
    local: int = 0
    """LOCAL_RANK of its first worker."""
    launch: str = ""
    """Names the job that started the launchers, so that those of two jobs do not mix."""

    @property
    def leads(self) -> bool:
        return self.index == 0


def place_of(stage: Stage, env: Mapping[str, str] = os.environ) -> Place:
    """This launcher's place, from torchrun, from srun, or from --node and --rank.

    Under torchrun and srun there is one launcher for each node, or one for each process. Raises
    ConfigError when their number fits neither.
    """
    if "TORCHELASTIC_RUN_ID" in env:
        tasks, index = int(env["WORLD_SIZE"]), int(env["RANK"])
        local, launch = int(env["LOCAL_RANK"]), f"torchrun {env['TORCHELASTIC_RUN_ID']}"
        starter = "torchrun"
    elif "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        tasks, index = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"])
        local, launch = int(env["SLURM_LOCALID"]), f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}"
        starter = "srun"
    else:
        if stage.rank >= stage.nodes:
            raise ConfigError(
                f"--rank {stage.rank}: nodes are numbered from 0 to {stage.nodes - 1}"
            )
        return Place(stage.rank, stage.nodes, stage.rank * stage.gpus, stage.gpus)
    if tasks == stage.world_size:
        return Place(index, tasks, index, 1, local, launch)
    if tasks == stage.nodes:
        return Place(index, tasks, index * stage.gpus, stage.gpus, 0, launch)
    raise ConfigError(
        f"{starter} starts {tasks} tasks: make it one for each node (nodes {stage.nodes}) or one "
        f"for each process (gpus x nodes = {stage.world_size})"
    )


def own_address(stage: Stage, env: Mapping[str, str] = os.environ) -> str:
    """Where the others reach this node: as asked for, that of the interface, or its name."""
    if stage.master_addr:
        return stage.master_addr
    if stage.interface:
        return _interface_address(stage.interface)
    if stage.nodes == 1:
        return "127.0.0.1"
    for name in (env.get("SLURMD_NODENAME"), socket.gethostname()):
        with suppress(OSError):
            if name and socket.getaddrinfo(name, None):
                return name
    raise ConfigError(
        f"the name of this machine, {socket.gethostname()}, has no address: give --master-addr"
    )


def interface_environment(name: str) -> dict[str, str]:
    """What makes NCCL and Gloo use a network interface; nothing without a name."""
    return dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), name) if name else {}


def _interface_address(name: str) -> str:
    """IPv4 address of a network interface."""
    import fcntl
    import struct

    SIOCGIFADDR = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(
                probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15])
            )
        except OSError as error:
            raise ConfigError(
                f"--interface {name}: {error.strerror}; `ip addr` lists them"
            ) from None
    return socket.inet_ntoa(answer[20:24])


class LostError(StepError):
    """Another launcher was killed, or its machine is lost."""


class Peer:
    """A connection to another launcher: sends signs of life, notices when there are none."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.name = name
        self.said: dict[str, Any] = {}
        """Everything the other one has said so far, the newest of each key."""
        self.lost = False
        self._connection = connection
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name=name, daemon=True)
        self._thread.start()

    def say(self, **what: Any) -> None:
        """Send; to one that is gone nothing is sent."""
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
    """How the part of a launcher ended; code 0 is well."""

    code: int
    message: str = ""

    def error(self, where: str) -> StepError:
        """The StepError that this outcome stands for."""
        return BY_CODE.get(self.code, StepError)(f"{where}: {self.message}")


class Party:
    """The launchers of one training; a context manager that lasts until the value is sealed.

    Leaving it without an error tells the others that all is done, with one that it failed.
    """

    def __init__(self, place: Place, address: str = "", port: int = 0) -> None:
        self.place = place
        self.address = address
        """Host of rank 0."""
        self.port = port
        """Port at which all processes meet; 0 without other launchers."""
        self.socket: socket.socket | None = None
        """The lead's: listens at `port` already, for rank 0 to take over."""
        self._peers: list[Peer] = []
        self._told = False

    def others_failed(self) -> StepError | None:
        """What another launcher has reported, or the loss of one; None while all is well."""
        for peer in self._peers:
            if peer.said.get("code"):
                return Outcome(peer.said["code"], peer.said["message"]).error(peer.name)
        for peer in self._peers:
            if peer.lost and not peer.said.keys() & {"code", "sealed"}:
                return LostError(
                    f"{peer.name} is gone: its launcher was killed or its machine is lost; run "
                    "again to go on from the last checkpoint"
                )
        return None

    def done(self) -> None:
        """All workers of this launcher ended well: wait for the others; raises if one failed.

        The lead returns once all have said so, the others once the value is sealed.
        """
        wanted = "code" if self.place.leads else "sealed"
        for peer in self._peers:
            if not self.place.leads:
                peer.say(code=0, message="")
        while (error := self.others_failed()) is None:
            if all(wanted in peer.said for peer in self._peers):
                return
            time.sleep(POLL)
        raise error

    def tell(self, error: BaseException) -> None:
        """Have the others end as well, for this reason; the first one told counts."""
        if not self._told:
            self._told = True
            for peer in self._peers:
                peer.say(code=getattr(error, "exit_code", 1), message=str(error))

    def __enter__(self) -> Party:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.socket is not None:
            self.socket.close()
        if error is not None:
            self.tell(error)
        elif self.place.leads:
            for peer in self._peers:
                peer.say(sealed=True)


def meet(stage: Stage, place: Place, work: Path, again: bool = False) -> Party | None:
    """Wait until all launchers of the training have come; None if meanwhile its value is sealed.

    `again`: a value that is sealed already is to be replaced, the lead will set it aside.

    Raises StepError after `MEET` seconds without all of them, LockedError when the lead has this
    launcher's part done by another one.
    """
    if place.count == 1:
        return Party(place)
    return _Lead(stage, place, work) if place.leads else _join(stage, place, work, again)


class _Lead(Party):
    """The first launcher: listens, and waits for all others."""

    def __init__(self, stage: Stage, place: Place, work: Path) -> None:
        super().__init__(place, own_address(stage))
        self._key = secrets.token_bytes(32)
        self._by_index: dict[int, Peer] = {}
        self._lock = threading.Lock()
        try:
            self._listener = Listener(("", stage.rdzv_port), backlog=place.count)
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
            self._peers = list(self._by_index.values())
            self.__exit__(type(error), error, None)
            raise
        finally:
            path.unlink(missing_ok=True)
            self._listener.close()
        self._peers = [self._by_index[index] for index in sorted(self._by_index)]
        for peer in self._peers:
            peer.say(address=self.address, port=self.port)

    def _wait(self, stage: Stage) -> None:
        until = time.monotonic() + MEET
        while len(self._by_index) < self.place.count - 1:
            for peer in list(self._by_index.values()):
                if peer.lost:
                    raise StepError(f"{peer.name} is gone before the training began; run again")
            if time.monotonic() > until:
                missing = sorted({*range(1, self.place.count)} - self._by_index.keys())
                raise StepError(
                    f"launchers {missing} did not come within {MEET:.0f} seconds: start them with "
                    f"the same settings, --node {stage.nodes} and their --rank, on the same store"
                )
            time.sleep(POLL)

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return  # closed: all are here
            threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: Connection) -> None:
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            hello = json.loads(connection.recv_bytes(1 << 16))
            index, launch = int(hello["index"]), str(hello["launch"])
            with self._lock:
                if launch != self.place.launch:
                    answer: dict[str, Any] = {"later": "another job leads this training"}
                elif index in self._by_index or not 0 < index < self.place.count:
                    answer = {"refused": f"launcher {index} is there already"}
                else:
                    answer = {"welcome": index}
                connection.send_bytes(json.dumps(answer).encode())
                if "welcome" in answer:
                    self._by_index[index] = Peer(connection, f"node {index} ({hello['host']})")
        except (AuthenticationError, OSError, EOFError, ValueError, KeyError):
            connection.close()  # not one of ours


def _join(stage: Stage, place: Place, work: Path, again: bool) -> Party | None:
    until = time.monotonic() + MEET
    sealed = work.parent / MANIFEST
    to_be_replaced = again and sealed.exists()
    while time.monotonic() < until:
        connection = _call(place, work)
        if connection is not None:
            peer = Peer(connection, "node 0")
            while "port" not in peer.said:
                if peer.lost or "code" in peer.said:
                    raise Outcome(
                        peer.said.get("code", 1), peer.said.get("message", "it is gone")
                    ).error(peer.name)
                time.sleep(POLL)
            party = Party(place, peer.said["address"], peer.said["port"])
            party._peers = [peer]
            return party
        if not to_be_replaced and sealed.exists():
            return None
        to_be_replaced = to_be_replaced and sealed.exists()
        time.sleep(0.5)
    raise StepError(
        f"the first node did not come within {MEET:.0f} seconds: start it with the same settings, "
        f"--node {stage.nodes} --rank 0, on the same store as this one"
    )


def _call(place: Place, work: Path) -> Connection | None:
    """A connection to the lead that the note names, welcomed by it; None to try again."""
    try:
        note = json.loads((work / NOTE).read_bytes())
        connection = Client((note["address"], note["port"]), authkey=bytes.fromhex(note["key"]))
    except (OSError, EOFError, AuthenticationError):
        return None  # not there yet, or left by an attempt that is over
    hello = {"index": place.index, "launch": place.launch, "host": socket.gethostname()}
    try:
        connection.send_bytes(json.dumps(hello).encode())
        answer = json.loads(connection.recv_bytes(1 << 16))
    except (OSError, EOFError):
        return None
    if "refused" in answer:
        raise LockedError(f"{work.parent}: {answer['refused']}; wait for it or end it")
    return connection if "welcome" in answer else None
