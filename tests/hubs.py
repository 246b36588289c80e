"""A hub on this machine, with which the real clients of ModelScope and Hugging Face talk."""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml

TOKEN = "secret-of-ann"
CUT_AT = 22_000_000  # where a long answer breaks off


class Hub(ThreadingHTTPServer):
    """A hub with one user, ann, that takes what both clients send and hands it out.

    `repositories` holds, by name ("datasets/…" for data), whether each is private, under which
    license, and its files. `mode` is how it behaves: "ok", "silent" (accepts and never answers), a
    number (every request ends in that error), "cut" (the next long answer breaks off), "cut
    always", "stall" (long answers stop in the middle and never end), "log-in" (a page instead of
    any answer), "wrong" (other bytes, as many as announced), or "too short" (whatever was
    announced).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.mode = "ok"
        self.repositories, self.blobs, self.commits = {}, {}, 0
        self.requests = []  # for the content of files: name, first byte, bytes sent
        self.xet_storage = None  # a folder
        self.closing, self.stalled = threading.Event(), threading.Event()

    def handle_error(self, request, client_address):
        """Clients hang up; that is no news."""

    def create(self, name, **facts):
        """Make a repository unless it is there, and tell whether it was."""
        there = name in self.repositories
        self.repositories.setdefault(name, {**facts, "files": {}})
        return there


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def metadata(card):
    """Return the block of YAML at the beginning of a model card."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_method(self):
        hub, parts = self.server, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.mode == "silent":
            return hub.closing.wait()
        if hub.mode == "log-in":
            return self.reply(200, b"<html>Who are you?</html>", Content_Type="text/html")
        if isinstance(hub.mode, int):
            said = "tea only, " + self.headers.get("Authorization", "")
            return self.reply(hub.mode, {"error": said, "Message": said})
        if parts.path == "/":
            return self.reply(200, {})
        # The address of a blob is the permission itself, and the data are for everyone.
        public = parts.path.startswith("/blob/") or "datasets/" in parts.path
        if not public and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid credentials", "Message": "who are you?"})
        query = {key: value[0] for key, value in parse_qs(parts.query).items()}
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if match and self.command in method.split():
                try:
                    return answer(self, *match.groups(), body=body, query=query)
                except PermissionError:
                    return self.reply(403, {"error": "not yours", "Message": "not yours"})
                except KeyError:
                    break  # no such repository or file
        self.reply(404, {"error": f"{self.command} {self.path}", "Message": self.path})

    do_GET = do_HEAD = do_POST = do_PUT = handle_method

    def send_file(self, name, content):
        """Send a file or the part of it that is asked for, or break off in the middle."""
        hub, headers = self.server, {"ETag": f'"{sha256(content)}"', "X_Repo_Commit": "0" * 40}
        first, last = 0, len(content) - 1
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or last)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
        part = content[first : last + 1]
        if hub.mode == "wrong":
            part = bytes(byte ^ 1 for byte in part[:99]) + part[99:]
        if self.command == "GET" and hub.mode == "too short" and len(part) > 1000:
            headers.pop("Content_Range", None)
            return self.reply(206 if wanted else 200, part[:-1000], **headers)
        whole = hub.mode in ("ok", "wrong") or last < CUT_AT or self.command == "HEAD"
        sent = part if whole else part[: max(0, CUT_AT - first)]
        if self.command == "GET":
            hub.requests.append({"file": name, "start": first, "sent": len(sent)})
        self.reply(206 if wanted else 200, sent, **headers, Content_Length=len(part))
        if not whole:
            if hub.mode == "cut":
                hub.mode = "ok"
            elif hub.mode == "stall":
                hub.stalled.set()
                hub.closing.wait()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def check_owner(self, name):
        """Raise unless ann may write there."""
        if not name.startswith("ann/"):
            raise PermissionError

    def batch(self, name, body, query):
        self.check_owner(name)
        hub, objects = self.server, []
        for wanted in json.loads(body)["objects"]:
            blob = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in hub.blobs:
                blob["actions"] = {"upload": {"href": f"{hub.endpoint}/blob/{wanted['oid']}"}}
            objects.append(blob)
        answer = {"transfer": "basic", "objects": objects}
        self.reply(200, {**answer, "Code": 200, "Data": answer})  # for either client

    def blob(self, oid, body, query):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.reply(200, {})

    # --- Hugging Face ---

    def hf_create(self, body, query):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self.check_owner(name)
        there = self.server.create(name, private=asked.get("visibility") == "private")
        self.reply(409 if there else 200, {"url": f"{self.server.endpoint}/{name}"})

    def hf_validate(self, body, query):
        errors = [] if metadata(json.loads(body)["content"]) else [{"message": "no metadata"}]
        self.reply(200, {"errors": errors, "warnings": []})

    def hf_preupload(self, name, body, query):
        self.check_owner(name)
        files = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if re.search(r"(safetensors|gguf|png)$", path) else "regular"
            files.append({"path": path, "shouldIgnore": False, "uploadMode": mode})
        self.reply(200, {"files": files})

    def hf_commit(self, name, body, query):
        hub = self.server
        files = hub.repositories[name]["files"]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                # What is not here is in Xet's storage, and known by its hash.
                files[value["path"]] = hub.blobs.get(value["oid"], value["oid"])
        hub.commits += 1
        address = f"{hub.endpoint}/{name}/commit/{'0' * 40}"
        self.reply(200, {"commitUrl": address, "commitOid": "0" * 40})

    def hf_info(self, name, body, query):
        siblings = [{"rfilename": file} for file in self.server.repositories[name]["files"]]
        self.reply(200, {"id": name, "sha": "0" * 40, "siblings": siblings})

    def hf_tree(self, name, body, query):
        files = self.server.repositories[name]["files"].items()
        rows = [{"path": path, "size": len(c), "oid": sha256(c)[:40]} for path, c in files]
        self.reply(200, [{"type": "file", **row} for row in rows])

    def hf_file(self, name, file, body, query):
        self.send_file(file, self.server.repositories[name]["files"][file])

    def hf_xet(self, name, body, query):
        """Send the client to Xet's storage, which may be a folder of this machine."""
        address, until = f"local://{self.server.xet_storage}", int(time.time()) + 3600
        headers = {"X_Xet_Cas_Url": address, "X_Xet_Token_Expiration": until}
        answer = {"casUrl": address, "accessToken": "xet", "exp": until}
        self.reply(200, answer, X_Xet_Access_Token="xet", **headers)

    # --- ModelScope ---

    def ms_reply(self, data):
        self.reply(200, {"Code": 200, "Success": True, "Data": data})

    def ms_create(self, body, query):
        asked = json.loads(body)
        name = f"{asked['Path']}/{asked['Name']}"
        self.check_owner(name)
        facts = {"private": asked["Visibility"] == 1, "license": asked["License"]}
        if self.server.create(name, **facts):
            return self.reply(400, {"Code": 10010101001, "Message": "exists", "Success": False})
        self.ms_reply({"Id": 1, "Name": asked["Name"]})

    def ms_commit(self, name, body, query):
        self.check_owner(name)
        hub = self.server
        for action in json.loads(body)["actions"]:
            assert action["action"] in ("create", "update")
            if action["type"] == "lfs":
                content = hub.blobs[action["sha256"]]
            else:
                content = base64.b64decode(action["content"])
            assert len(content) == action["size"]
            hub.repositories[name]["files"][action["path"]] = content
        hub.commits += 1
        self.ms_reply({"CommitId": "0" * 40})

    def ms_list(self, name, body, query):
        files = self.server.repositories[name]["files"].items()
        rows = [{"Path": p, "Name": p, "Size": len(c), "Sha256": sha256(c)} for p, c in files]
        self.ms_reply({"Files": [{"Type": "blob", "Revision": "master", **row} for row in rows]})

    def ms_info(self, name, body, query):
        self.ms_reply({"Id": 1, "files": len(self.server.repositories[name]["files"])})

    def ms_file(self, name, body, query):
        files = self.server.repositories[name]["files"]
        self.send_file(query["FilePath"], files[query["FilePath"]])


MS_NAME = "/api/v1/(?:models/)?((?:datasets/)?[^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.hf_create),
    ("POST", "/api/validate-yaml", Handler.hf_validate),
    ("POST", "/api/models/(.+)/preupload/main", Handler.hf_preupload),
    ("POST", r"/(.+)\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", "/api/models/(.+)/commit/main", Handler.hf_commit),
    ("GET", "/api/models/(.+)/xet-write-token/main", Handler.hf_xet),
    ("GET", "/api/(?:models/)?(.+)/tree/.+", Handler.hf_tree),
    ("GET", "/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)(?:/revision/.+)?", Handler.hf_info),
    ("GET HEAD", "/(.+)/resolve/[^/]+/(.+)", Handler.hf_file),
    ("POST", "/api/v1/models", Handler.ms_create),
    ("POST", "/api/v1/repos/models/(.+)/info/lfs/objects/batch", Handler.batch),
    ("POST", "/api/v1/repos/models/(.+)/commit/master", Handler.ms_commit),
    ("GET", MS_NAME + "/repo/(?:files|tree)", Handler.ms_list),
    ("GET HEAD", MS_NAME + "/repo", Handler.ms_file),
    ("GET", "/api/v1/(datasets/[^/]+/[^/]+)", Handler.ms_info),
    ("PUT", "/blob/(.+)", Handler.blob),
]
