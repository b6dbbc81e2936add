"""A small HTTP server that speaks the API of the Hugging Face hub to huggingface_hub itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits of one repository, each a directory, and the names that stand for them."""

    commits: dict[str, Path] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, directory: Path, *names: str) -> str:
        """Add the files of a directory as a commit; `main` and `names` then stand for it."""
        number = hashlib.sha1(f"{len(self.commits)}{directory}".encode()).hexdigest()  # noqa: S324
        self.commits[number] = directory
        self.names |= dict.fromkeys(("main", *names), number)
        return number

    def find(self, revision: str) -> str | None:
        """The commit of a revision."""
        return revision if revision in self.commits else self.names.get(revision)


@dataclass
class HubServer:
    """Repositories by `models/org/name` or `datasets/org/name`, and the paths asked for."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def model(self, name: str) -> Repository:
        """The model repository of a name, made if it is missing."""
        return self.repositories.setdefault(f"models/{name}", Repository())

    def dataset(self, name: str) -> Repository:
        """The dataset repository of a name, made if it is missing."""
        return self.repositories.setdefault(f"datasets/{name}", Repository())


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running server on this machine."""
    hub = HubServer()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests read `asked`."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            self._api(parts[1:])
        else:
            self._file(parts if parts[0] == "datasets" else ["models", *parts])

    def _api(self, parts: list[str]) -> None:
        """KIND/ORG/NAME, with revision/REV or tree/REV behind."""
        key, rest = "/".join(parts[:3]), parts[3:]
        found = self._repository(key, "/".join(rest[1:]) or "main")
        if found is None:
            return
        commit, files = found
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": _oid(p)}
                for n, p in files.items()
            ]
            self._send(json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "/".join(parts[1:3]), "sha": commit, "siblings": siblings, "tags": []}
            self._send(json.dumps(info).encode())

    def _file(self, parts: list[str]) -> None:
        """KIND/ORG/NAME/resolve/REV/PATH."""
        found = self._repository("/".join(parts[:3]), parts[4])
        if found is None:
            return
        commit, files = found
        path = files.get("/".join(parts[5:]))
        if path is None:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(path.read_bytes(), 200, {"X-Repo-Commit": commit, "ETag": f'"{_oid(path)}"'})

    def _repository(self, key: str, revision: str) -> tuple[str, dict[str, Path]] | None:
        repository = self.served.repositories.get(key)
        if repository is None:
            return self._send(b"", 404, {"X-Error-Code": "RepoNotFound"})
        if repository.gated:
            return self._send(b"", 403, {"X-Error-Code": "GatedRepo"})
        commit = repository.find(revision)
        if commit is None:
            return self._send(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        root = repository.commits[commit]
        files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
        return commit, files

    def _send(self, body: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()  # noqa: S324
