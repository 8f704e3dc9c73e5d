"""A loopback server that speaks the part of the Hugging Face Hub protocol the real client libraries use.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.env(cache_dir, token=True)})
        hub.repos["user/name"].files  # {path: bytes}; dataset repositories are at "datasets/user/name"

State lives in memory only. Not here: Xet, multipart LFS, pull requests, gated repositories, Spaces, and the YAML of
model cards (validation accepts everything, `cardData` is absent).
"""

import base64
import hashlib
import json
import re
import threading
from collections import namedtuple
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# "METHOD /path": (handler, access). Anyone may call "open"; "read" needs the owner's token on private repositories;
# "write" always needs the owner's token; "user" needs any valid token.
ROUTES = {
    "GET /api/whoami-v2": ("whoami", "user"),
    "POST /api/validate-yaml": ("validate_yaml", "open"),
    "POST /api/repos/create": ("create_repo", "user"),
    "GET /api/{kind}/{repo}": ("info", "read"),
    "GET /api/{kind}/{repo}/revision/{rev}": ("info", "read"),
    "GET /api/{kind}/{repo}/tree/{rev}": ("tree", "read"),
    "GET /api/{kind}/{repo}/tree/{rev}/{path}": ("tree", "read"),
    "POST /api/{kind}/{repo}/paths-info/{rev}": ("paths_info", "read"),
    "GET /api/{kind}/{repo}/refs": ("refs", "read"),
    "GET /api/{kind}/{repo}/auth-check": ("auth_check", "read"),
    "GET /api/{kind}/{repo}/auth-check/write": ("auth_check", "write"),
    "POST /api/{kind}/{repo}/preupload/{rev}": ("preupload", "write"),
    "POST /api/{kind}/{repo}/commit/{rev}": ("commit", "write"),
    "POST /{datasets}{repo}.git/info/lfs/objects/batch": ("lfs_batch", "write"),
    "POST /{datasets}{repo}.git/info/lfs/verify": ("lfs_verify", "write"),
    "PUT /lfs/{oid}": ("lfs_put", "open"),  # like a presigned storage URL: the client sends no token here
    "HEAD /{datasets}{repo}/resolve/{rev}/{path}": ("resolve", "read"),
    "GET /{datasets}{repo}/resolve/{rev}/{path}": ("resolve", "read"),
}
PARTS = {"kind": "models|datasets", "datasets": "(?:datasets/)?", "repo": "[^/]+/[^/]+", "rev": "[^/]+", "path": ".+"}
PARTS = {name: f"(?P<{name}>{pattern})" for name, pattern in {**PARTS, "oid": "\\w{64}"}.items()}
PATTERNS = {re.compile(route.format(**PARTS)): target for route, target in ROUTES.items()}

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npz", ".parquet", ".arrow", ".zip")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Exception):
    """An error answer; `code` is the X-Error-Code from which the client picks its exception class."""

    def __init__(self, status, message, code=None, headers=()):
        super().__init__(message)
        code_header = {"X-Error-Code": code} if code else {}
        self.status, self.headers = status, {"X-Error-Message": message, **code_header, **dict(headers)}


def files_of(folder):
    """A folder as a commit takes it: {path: bytes}."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uses_lfs(path, sample, size):
    return size > 0 and (path.endswith(LFS_SUFFIXES) or b"\0" in sample or size > 10_000_000)


class Blob:
    """How the Hub describes a file: large and binary files are git-lfs pointers, the rest plain git blobs."""

    def __init__(self, path, data):
        self.size, self.lfs = len(data), uses_lfs(path, data[:512], len(data))
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        stored = self.pointer.encode() if self.lfs else data
        self.git_oid = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
        self.etag = self.sha256 if self.lfs else self.git_oid

    def describe(self, git_key, sha_key):
        """A tree listing and the siblings of a repository name the same hashes differently."""
        lfs = {"lfs": {sha_key: self.sha256, "size": self.size, "pointerSize": len(self.pointer)}} if self.lfs else {}
        return {git_key: self.git_oid, "size": self.size, **lfs}


Commit = namedtuple("Commit", "sha title date files")


class Repo:
    """Commits hold whole {path: bytes} trees; refs map "main" (and any ref a test adds) to a commit."""

    def __init__(self, name, dataset=False, private=False):
        self.name, self.prefix, self.private = name, "datasets/" if dataset else "", private
        self.refs, self.commits, self.lock = {}, [], threading.Lock()
        self.commit("initial commit", {".gitattributes": GIT_ATTRIBUTES})

    @property
    def files(self):
        return self.refs["main"].files

    def commit(self, title, changes, ref="main"):
        """Apply {path: bytes, or None to delete}; a commit that would change nothing is not made."""
        with self.lock:
            parent = self.refs.get(ref)
            files = {**(parent.files if parent else {}), **changes}
            files = {path: files[path] for path in sorted(files) if files[path] is not None}
            if parent is None or files != parent.files:
                date = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
                sha = hashlib.sha1(f"{self.prefix}{self.name} {len(self.commits)} {date}".encode()).hexdigest()
                self.refs[ref] = Commit(sha, title, date, files)
                self.commits.append(self.refs[ref])
            return self.refs[ref]

    def find(self, rev):
        found = self.refs.get(rev) or next((commit for commit in self.commits if commit.sha == rev), None)
        if found is None:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; the second would wait for an ACK

    def dispatch(self):
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        # read in any case, or the next request on this connection would start inside the body
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, url.path, "Authorization" in self.headers))
        others = {key: value for key, value in self.headers.items() if key.lower() != "authorization"}
        self.hub.received.append(f"{self.command} {self.path} {others}\n".encode() + self.body)
        fault = self.hub.fault and self.hub.fault(self.command, url.path)
        self.cut = fault == "cut"
        if fault == "reset":
            self.close_connection = True
            return
        try:
            if isinstance(fault, int):
                raise HubError(fault, "Injected fault")
            if isinstance(fault, HubError):
                raise fault
            for pattern, target in PATTERNS.items():
                if match := pattern.fullmatch(f"{self.command} {url.path}"):
                    handler, access = target
                    break
            else:
                raise HubError(404, f"Not a route of this server: {self.command} {url.path}")
            parts = {key: unquote(value) for key, value in match.groupdict().items()}
            self.authorize(access, parts)
            answer = getattr(self, handler)(**parts)
            if answer is not None:  # None: the handler has replied itself
                self.reply(json.dumps(answer).encode())
        except HubError as error:
            self.reply(json.dumps({"error": str(error)}).encode(), error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def reply(self, body, status=200, headers=()):
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **dict(headers), "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.cut:
            body, self.close_connection = body[: len(body) // 2], True
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass

    def authorize(self, access, parts):
        """Set self.user and, where the route names them, self.repo and self.rev."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user = self.hub.tokens.get(token)
        if token and not self.user:  # a wrong token is refused even where none is needed
            raise HubError(401, "Invalid credentials in Authorization header")
        if access == "user" and not self.user:
            raise HubError(401, "Invalid username or password.")
        if "repo" not in parts:
            return
        prefix = "datasets/" if parts.get("kind") == "datasets" else parts.get("datasets", "")
        self.repo = self.hub.repos.get(prefix + parts["repo"])
        owner = parts["repo"].split("/")[0] == self.user
        if self.repo is None or (self.repo.private and not owner):
            # without a token, the Hub does not tell a missing repository from a private one
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if access == "write" and not owner:
            raise HubError(403 if self.user else 401, "You don't have the rights to write to this repository")
        self.rev = self.repo.find(parts.get("rev", "main"))

    def url(self, repo):
        return f"{self.hub.endpoint}/{repo.prefix}{repo.name}"

    def whoami(self):
        auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        return {"type": "user", "id": self.user, "name": self.user, "fullname": self.user, "orgs": [], "auth": auth}

    def validate_yaml(self):
        license = re.search(r"^license: (.*)$", json.loads(self.body)["content"], re.MULTILINE)
        if license and license[1] not in ("mit", "apache-2.0"):  # the Hub knows more
            return self.reply(b'"license" must be one of [apache-2.0, mit]', 400)
        return {"errors": [], "warnings": []}

    def create_repo(self):
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        if owner != self.user:
            raise HubError(403, f"You don't have the rights to create a repository under {owner}")
        private = asked.get("visibility") == "private"
        repo = Repo(f"{owner}/{asked['name']}", asked.get("type") == "dataset", private)
        answer = {"url": self.url(repo), "name": repo.name, "private": private}
        if self.hub.repos.setdefault(repo.prefix + repo.name, repo) is repo:
            return answer
        # with exist_ok, the client reads the url from this answer too
        self.reply(json.dumps({**answer, "error": "You already created this repo"}).encode(), 409)

    def info(self, **_):
        siblings = [{"rfilename": path} for path in self.rev.files]
        if self.query.get("blobs"):
            for file in siblings:
                file |= Blob(file["rfilename"], self.rev.files[file["rfilename"]]).describe("blobId", "sha256")
        facts = {"id": self.repo.name, "author": self.repo.name.split("/")[0], "sha": self.rev.sha, "tags": []}
        facts |= {"lastModified": self.rev.date, "createdAt": self.repo.commits[0].date, "downloads": 0, "likes": 0}
        return {**facts, "private": self.repo.private, "gated": False, "disabled": False, "siblings": siblings}

    def entries(self):
        """Every file and folder of the revision, as {path: entry}."""
        found = {}
        for path, data in self.rev.files.items():
            for slash in re.finditer("/", path):
                folder = path[: slash.start()]
                oid = hashlib.sha1(folder.encode()).hexdigest()  # only shaped like a tree id
                found[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            found[path] = {"type": "file", "path": path, **Blob(path, data).describe("oid", "oid")}
        return found

    def tree(self, path="", **_):
        entries, root = self.entries(), f"{path}/" if path else ""
        if path and entries.get(path, {}).get("type") != "directory":
            self.no_entry(path)
        deep = self.query.get("recursive", "").lower() == "true"
        return [entries[p] for p in entries if p.startswith(root) and (deep or "/" not in p[len(root) :])]

    def paths_info(self, **_):
        entries, asked = self.entries(), parse_qs(self.body.decode()).get("paths", [])
        return [entries[path.strip("/")] for path in asked if path.strip("/") in entries]

    def refs(self, **_):
        refs = self.repo.refs.items()
        branches = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": commit.sha} for ref, commit in refs]
        return {"branches": branches, "converts": [], "tags": [], "pullRequests": []}

    def auth_check(self, **_):
        return {}

    def no_entry(self, path):
        # given the commit, the client remembers that this revision has no such file
        raise HubError(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": self.rev.sha})

    def resolve(self, path, **_):
        if path not in self.rev.files:
            self.no_entry(path)
        data = self.rev.files[path]
        size, blob = len(data), Blob(path, data)
        headers = {"Content-Type": "application/octet-stream", "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        headers["X-Repo-Commit"] = self.rev.sha
        if blob.lfs:
            headers |= {"X-Linked-Size": size, "X-Linked-ETag": f'"{blob.etag}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.reply(data, 200, headers)
        first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        if first > last:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        self.reply(data[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{size}"})

    def preupload(self, **_):
        files = []
        for file in json.loads(self.body)["files"]:
            path, data = file["path"], self.rev.files.get(file["path"])
            mode = "lfs" if uses_lfs(path, base64.b64decode(file["sample"]), file["size"]) else "regular"
            # the client leaves a file out of its commit when this is also the oid of what it holds
            oid = None if data is None else Blob(path, data).etag
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files, "commitOid": self.rev.sha}

    def lfs_batch(self, **_):
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.blobs:  # without actions, the client takes the object as stored already
                upload = {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}
                item["actions"] = {"upload": upload, "verify": {"href": f"{self.url(self.repo)}.git/info/lfs/verify"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "Content does not match its sha256")
        self.hub.blobs[oid] = self.body
        return {}

    def lfs_verify(self, **_):
        if json.loads(self.body)["oid"] not in self.hub.blobs:
            raise HubError(404, "Object not stored")
        return {}

    def commit(self, rev, **_):
        if rev not in self.repo.refs or self.query.get("create_pr"):
            raise HubError(400, "Only commits to an existing branch are served here")
        changes = {}
        for key, value in (json.loads(line).values() for line in self.body.splitlines()):
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", self.rev.sha) != self.rev.sha:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.hub.blobs:
                changes[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile" and value["path"] in self.rev.files:
                changes[value["path"]] = None
            elif key == "deletedFolder":
                changes |= {path: None for path in self.rev.files if path.startswith(value["path"].rstrip("/") + "/")}
            else:  # an object never uploaded, or a file that is not there
                raise HubError(400, f"Cannot apply {key} to {value.get('path')}")
        made = self.repo.commit(title, changes, rev)
        return {"success": True, "commitOid": made.sha, "commitUrl": f"{self.url(self.repo)}/commit/{made.sha}"}


class HubServer:
    """Runs the server on a thread, from entering to leaving the context.

    `fault(method, path)` is asked about each request: None serves it, an int or a HubError answers with that, "reset"
    closes the connection without an answer, "cut" serves it and closes after half of the body. Add to `tokens` for
    further users. `received` has each request as it came, but for its Authorization header.
    """

    def __init__(self, user="user"):
        self.token = f"hf_loopback_{user}"
        self.tokens = {self.token: user}
        self.repos, self.blobs, self.requests, self.received, self.fault = {}, {}, [], [], None

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def env(self, cache_dir, token=False):
        env = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache_dir), "NO_PROXY": "127.0.0.1"}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**env, "HF_TOKEN": self.token} if token else env
