"""A Hub on this machine, without a network: of its protocol what huggingface_hub needs to list and fetch files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

Files = Mapping[str, bytes]


@dataclass
class Hub:
    """Repositories, and what was asked of them.

    Attributes:
        repositories: by id, then by revision, files by name.
        refused: ids with the status and the error code that every request for a file of theirs gets.
        asked: method and path of every request; tokens: that came with them.
    """

    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        parts = [unquote(part) for part in path.partition("?")[0].strip("/").split("/")]
        listing = parts[:2] == ["api", "models"]
        user, name, *rest = parts[2:] if listing else parts
        of_repository = self.repositories.get(f"{user}/{name}")
        if of_repository is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if not listing and f"{user}/{name}" in self.refused:
            status, code = self.refused[f"{user}/{name}"]
            return status, {"X-Error-Code": code}, b""
        revision = rest[1] if len(rest) > 1 else "main"
        commits = {commit(revision): revision for revision in of_repository}
        files = of_repository.get(commits.get(revision, revision))
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        sha = commit(commits.get(revision, revision))
        if listing:
            body = {"_id": "0", "id": f"{user}/{name}", "sha": sha, "siblings": [{"rfilename": n} for n in files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        content = files.get("/".join(rest[2:]))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content

    def fetched(self) -> set[str]:
        """Names of the files that were fetched."""
        found = (re.fullmatch(r"GET /.+/resolve/[^/]+/(.+)", request) for request in self.asked)
        return {match[1] for match in found if match}


def commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("authorization", ""))
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run(
    home: Path, *arguments: object, hub: Hub | None = None, cwd: Path | None = None, **environment: str
) -> tuple[int, str, str]:
    """The command line in a process of its own, because huggingface_hub reads its settings when it is imported."""
    settings = {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    settings |= {"HF_ENDPOINT": hub.url} if hub else {"HF_HUB_OFFLINE": "1"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
    done = subprocess.run(
        [sys.executable, "-m", "para_ext", *map(str, arguments)],
        capture_output=True, text=True, check=False,
        cwd=cwd or home.parent, env={**inherited, **settings, **environment},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr
