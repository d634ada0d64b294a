"""A local server with the part of the Hub's protocol that huggingface_hub uses, and the environment of its clients."""

import base64
import hashlib
import json
import os
import threading
from fnmatch import fnmatch
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A server with repositories, {name: {file: bytes}}, and with faults that tests switch on."""

    def __init__(self):
        self.repositories = {}
        self.commit = COMMIT
        self.gated = set()  # answered with status 403 for every token
        self.private = {}  # repository -> the token that may read it
        self.cut = set()  # files whose first download ends in the middle
        self.silent = False  # whether the server closes every connection without an answer
        self.status = None  # the status of every answer, if not None
        self.busy = {}  # part of "METHOD path" -> the statuses of the answers to the next such requests
        self.flaky = None  # a random.Random; about half of the downloads of files then end in the middle
        self.hanging = None  # part of "METHOD path" of the requests that are never answered, if not None
        self.circular = False  # whether files are redirected to each other in a circle
        self.swapped = {}  # file -> the content that is sent in its place
        self.lengths = {}  # file -> what is added to the length that is announced for its content
        self.before = self.after = None  # functions that are called before and after each answer
        self.redirect = False  # whether large files come from another host name, as on the Hub
        self.requests = []
        self.writer = None  # the token with write access
        self.branches = {}  # repository -> its branches besides main, all with the same files
        self.uploaded = {}  # the content of large files by SHA-256
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                hub.handle(self, partial(hub.answer, body=False))

            def do_GET(self):
                hub.handle(self, partial(hub.answer, body=True))

            def do_POST(self):
                hub.handle(self, hub.receive)

            def do_PUT(self):
                hub.handle(self, hub.receive)

        self.stopped = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *arguments: None  # of clients that close the connection
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)  # seconds per poll
        self.thread.start()
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        if self.server is not None:
            self.stopped.set()
            self.server.shutdown()
            self.server.server_close()
            self.thread.join()
            self.server = None

    def fetched(self):
        """The files whose content was requested."""
        return sorted(
            {path.split("/", 5)[5] for method, path in self.requests if method == "GET" and "/resolve/" in path}
        )

    # -- Answers

    def handle(self, request, respond):
        """Answers a request with ``respond``, or fails as the tests want."""
        if self.before is not None:
            self.before()
        line = f"{request.command} {request.path}"
        if self.hanging is not None and self.hanging in line:
            self.stopped.wait()
        statuses = next((statuses for part, statuses in self.busy.items() if part in line and statuses), None)
        if statuses is not None:
            return self._error(request, statuses.pop(0), "Busy")
        respond(request)
        if self.after is not None:
            self.after()
        return None

    def answer(self, request, *, body):
        path = unquote(request.path.split("?")[0])
        self.requests.append((request.command, path))
        if self.silent:
            request.close_connection = True
            return None
        if self.status is not None:
            return self._error(request, self.status, "Unavailable")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        elif len(parts) > 3 and parts[2] == "resolve":
            name, rest = "/".join(parts[:2]), parts[2:]
        elif parts[0] == "elsewhere":
            return self._content(request, self.repositories["/".join(parts[1:3])]["/".join(parts[3:])], body, {})
        else:
            return self._error(request, 404, "EntryNotFound")
        if name not in self.repositories or (
            name in self.private and request.headers.get("Authorization") != f"Bearer {self.private[name]}"
        ):
            return self._error(request, 401, "RepoNotFound")
        if name in self.gated:
            return self._error(request, 403, "GatedRepo")
        files = self.repositories[name]
        known = {"main", self.commit, *self.branches.get(name, ())}
        if rest and rest[0] in ("resolve", "revision", "tree") and rest[1] not in known:
            return self._error(request, 404, "RevisionNotFound")
        if rest and rest[0] == "resolve":
            return self._file(request, name, "/".join(rest[2:]), body)
        if rest and rest[0] == "tree":
            content = [
                {"type": "file", "path": file, "size": len(data), "oid": _git_hash(data)}
                for file, data in files.items()
            ]
        else:
            content = {
                "id": name,
                "modelId": name,
                "sha": self.commit,
                "private": False,
                "gated": False,
                "disabled": False,
            }
            content |= {"tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": file} for file in files]}
        return self._content(
            request,
            json.dumps(content).encode(),
            body,
            {"Content-Type": "application/json", "X-Repo-Commit": self.commit},
        )

    def receive(self, request):
        """Answers the requests of an upload: repository, branch, large files by their hash, and the commit."""
        path = unquote(request.path.split("?")[0])
        self.requests.append((request.command, path))
        data = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        parts = path.strip("/").split("/")
        if parts[0] == "upload":
            assert hashlib.sha256(data).hexdigest() == parts[1]
            self.uploaded[parts[1]] = data
            return self._json(request, {})
        if parts == ["api", "validate-yaml"]:  # the metadata of a model card
            return self._json(request, {"errors": [], "warnings": []})
        if request.headers.get("Authorization") != f"Bearer {self.writer}":
            return self._error(request, 401 if self.writer is None else 403, "Unauthorized")
        if parts == ["api", "repos", "create"]:
            wanted = json.loads(data)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            if name in self.repositories:
                return self._json(request, {"error": "exists", "url": f"{self.url}/{name}"}, status=409)
            self.repositories[name] = {".gitattributes": b""}
            return self._json(request, {"url": f"{self.url}/{name}", "name": name})
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/upload/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            return self._json(request, {"transfer": "basic", "objects": objects})
        name, (action, branch) = "/".join(parts[2:4]), parts[4:6]
        if name not in self.repositories:
            return self._error(request, 404, "RepoNotFound")
        if action == "branch":
            self.branches.setdefault(name, set()).add(branch)
            return self._json(request, {})
        if action == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(data)["files"]
            ]
            return self._json(request, {"files": modes})
        assert action == "commit", path
        files = self.repositories[name]
        for line in map(json.loads, data.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.uploaded[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.commit = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        return self._json(request, {"commitUrl": f"{self.url}/{name}/commit/{self.commit}", "commitOid": self.commit})

    def _json(self, request, content, status=200):
        headers = {"Content-Type": "application/json"}
        return self._content(request, json.dumps(content).encode(), True, headers, status=status)

    def _file(self, request, name, file, body):
        files = self.repositories[name]
        if file not in files:
            return self._error(request, 404, "EntryNotFound")
        data = files[file]
        if self.circular:
            location = f"/{name}/resolve/main/{file}?again={len(self.requests)}"
            return self._content(request, b"", body, {"Location": location}, status=307)
        large = _mode(file) == "lfs"
        digest = hashlib.sha256(data).hexdigest() if large else _git_hash(data)
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": self.commit}
        if large and self.redirect:
            headers = {"X-Repo-Commit": self.commit, "X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            headers["Location"] = f"http://localhost:{self.port}/elsewhere/{name}/{file}"
            return self._content(request, b"", body, headers, status=302)
        if body:
            data = self.swapped.get(file, data)
        return self._content(request, data, body, headers, file=file)

    def _content(self, request, data, body, headers, *, status=200, file=None):
        begin = 0
        match = (request.headers.get("Range") or "").removeprefix("bytes=").split("-")[0]
        if match and body:
            begin, status = int(match), 206
            headers = {**headers, "Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
        request.send_response(status)
        for key, value in {"Accept-Ranges": "bytes", **headers}.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data) - begin + (self.lengths.get(file, 0) if body else 0)))
        request.end_headers()
        if not body:
            return
        flaky = self.flaky is not None and file is not None and self.flaky.random() < 0.5
        if file in self.cut or flaky or file in self.lengths:
            self.cut.discard(file)
            end = len(data) if file in self.lengths else begin + max(1, (len(data) - begin) // 2)
            request.wfile.write(data[begin:end])
            request.wfile.flush()
            request.close_connection = True
            request.connection.close()
            return
        request.wfile.write(data[begin:])

    def _error(self, request, status, code):
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", code)
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("Content-Length", "0")
        request.end_headers()


def environment(url, home):
    """The environment of this process, with the URL of the server and a folder for the cache."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {
        **kept,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }


def _git_hash(data):
    """The git hash of a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _mode(file):
    """How the Hub stores a file: "lfs" for the file name extensions of weights, "regular" for others."""
    return "lfs" if fnmatch(file, "*.safetensors") or fnmatch(file, "*.bin") else "regular"
