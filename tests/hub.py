"""As much of the Hub as an upload and a download need, on 127.0.0.1, its repositories in a local folder."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_test"
COMMIT = "c" * 40


class _Hub(BaseHTTPRequestHandler):
    """Repositories are folders NAMESPACE/NAME under `root`; every file is a regular one, none goes by LFS."""

    root: Path
    requests: list[str]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials"}, status=401)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            (self.root / repo).mkdir(parents=True)
            (self.root / f"{repo}.json").write_text(json.dumps(wanted))
            return self._answer({"url": f"http://{self.headers['Host']}/{repo}"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        repo, action = self.path.removeprefix("/api/models/").rsplit("/main", 1)[0].rsplit("/", 1)
        if action == "preupload":
            files = [
                {**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        assert action == "commit"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                (self.root / repo / line["value"]["path"]).write_bytes(
                    base64.b64decode(line["value"]["content"])
                )
        return self._answer(
            {"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}
        )

    def do_HEAD(self):
        self.requests.append(self.path)
        repo, _, name = self.path.lstrip("/").partition("/resolve/main/")
        file = self.root / repo / name
        if not (name and file.is_file()):
            return self._answer({}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(content := file.read_bytes()).hexdigest()
        return self._answer(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_GET = do_HEAD

    def _answer(self, content, status=200, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_arguments):
        pass


@contextmanager
def serve(root):
    """The address of a Hub that keeps its repositories in `root`, and the list of requests it has had."""
    handler = type("Hub", (_Hub,), {"root": root, "requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.requests
        server.shutdown()
