"""Checks of Weights & Biases: whether it is used, installed, reachable and has a key."""

from __future__ import annotations

import netrc
import os
import socket
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from urllib.parse import urlsplit

from llava_steps.checks.finding import Finding
from llava_steps.settings.stage.stage import Stage

WHAT = "W&B"
HOST = "https://api.wandb.ai"


def check(stages: list[Stage], env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Findings for stages that log to W&B; the key itself is never shown."""
    using = [stage for stage in stages if stage.wandb]
    if not using:
        yield Finding("ok", WHAT, "not used: wandb is not set for any stage")
        return
    if find_spec("wandb") is None:
        yield Finding("fail", WHAT, "the package wandb is not installed", "pip install wandb")
        return
    mode = env.get("WANDB_MODE") or ("online" if _online(using) else "offline")
    if mode != "online":
        fix = "`wandb sync` uploads `.work/wandb` of the store entry"
        yield Finding("ok", WHAT, f"{mode}: nothing is uploaded during training", fix)
        return
    url = urlsplit(env.get("WANDB_BASE_URL") or HOST)
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    fix = "Set wandb_mode: offline, and sync later"
    proxied = env.get("https_proxy") or env.get("HTTPS_PROXY")
    if proxied:
        yield Finding("note", WHAT, f"{host} is reached through a proxy and was not checked")
    else:
        try:
            socket.create_connection((host, port), timeout=10).close()
            yield Finding("ok", WHAT, f"{host} answers")
        except OSError as error:
            yield Finding("fail", WHAT, f"{host} cannot be reached: {error}", fix)
    if env.get("WANDB_API_KEY") or _kept(host):
        yield Finding("ok", WHAT, "an API key is set")
    else:
        yield Finding(
            "fail", WHAT, "no API key is set", "Set WANDB_API_KEY, or wandb_mode: offline"
        )


def _online(stages: list[Stage]) -> bool:
    return any(stage.wandb_mode == "online" for stage in stages)


def _kept(host: str) -> bool:
    """Whether `wandb login` stored a key for this host."""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
