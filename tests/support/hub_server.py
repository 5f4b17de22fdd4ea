"""A stand-in for the Hugging Face hub on this machine: it serves folders to the download client.

Endpoints: /api/models/ID and its revision and tree, /ID/resolve/REVISION/FILE with HEAD and GET.
Source: the requests that huggingface_hub sends, and https://huggingface.co/docs/hub/api.
"""
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """repositories: {"owner/name": folder}. It records requests, and fails where a test says so."""

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.commit = "c0ffee00" * 5
        self.asked = []                     # (method, path, the Range header), in order
        self.refused = {}                   # {"owner/name": (status, X-Error-Code or None)}
        self.cut = {}                       # {file: [bytes to send before breaking off, ...]}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self):
        """The files that were sent since the last call, in the order of their names."""
        paths = [path.partition("/resolve/")[2].partition("/")[2]
                 for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]
        self.asked.clear()
        return sorted(paths)

    def handle_error(self, *_):             # a client that disconnects is no error
        pass


@contextmanager
def serving(repositories):
    with Hub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers["Range"]))
        match = (re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path)
                 or re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path))
        name = match and match[1]
        status, code = self.server.refused.get(name, (200, None))
        if status != 200 and (code != "GatedRepo" or "/resolve/" in path):      # names are public
            return self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
        if name not in self.server.repositories:        # the hub's reply to unknown names
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        folder = self.server.repositories[name]
        if path.startswith("/api/"):
            files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*")
                           if file.is_file())
            content = [{"type": "file", "path": file, "size": (folder / file).stat().st_size,
                        "oid": etag((folder / file).read_bytes())} for file in files]
            if not (match[2] or "").startswith("/tree/"):
                content = {"id": name, "sha": self.server.commit, "siblings": [
                    {"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(content).encode())
        if not (folder / match[2]).is_file():
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        self.send_file(match[2], (folder / match[2]).read_bytes())

    def send_file(self, file, data):
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": self.server.commit,
                   "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")
        start, size = int(start[1]), len(data)
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        cuts = self.server.cut.get(file) if self.command == "GET" else None
        self.answer(206 if start else 200, data[start:], headers, cuts.pop(0) if cuts else None)

    def answer(self, status, body, headers=(), sent=None):
        """sent: how many bytes of the body to send before closing the connection; None for all."""
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "Content-Type": "application/json",
                           **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.wfile.flush()
            self.close_connection = True


def etag(data):
    return hashlib.sha1(data).hexdigest()
