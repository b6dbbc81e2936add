"""Addresses and network interfaces of this node."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress

from llava_steps.core.errors import ConfigError
from llava_steps.settings.stage.stage import Stage


def own_address(stage: Stage, env: Mapping[str, str] = os.environ) -> str:
    """Address of this node for the others: as configured, of the interface, or its name."""
    if stage.master_addr:
        return stage.master_addr
    if stage.interface:
        return interface_address(stage.interface)
    if stage.nodes == 1:
        return "127.0.0.1"
    for name in (env.get("SLURMD_NODENAME"), socket.gethostname()):
        with suppress(OSError):
            if name and socket.getaddrinfo(name, None):
                return name
    raise ConfigError(
        f"the name of this machine, {socket.gethostname()}, has no address; give --master-addr"
    )


def interface_environment(name: str) -> dict[str, str]:
    """Variables that make NCCL and Gloo use a network interface; none without a name."""
    return dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), name) if name else {}


def interface_address(name: str) -> str:
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
