"""A local bucket server: the part of Google Cloud Storage's JSON API that we and Orbax use.

Objects are kept in memory, with generations and preconditions on them; listings come in short
pages. There are no permissions, and no spurious failures.
"""

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse

import google_crc32c

PAGE = 20  # entries per page of a listing; small, so that there are several pages
_OBJECT = re.compile(r"/b/([^/]+)/o/([^/]+)$")
_COPY = re.compile(r"/b/([^/]+)/o/([^/]+)/(rewriteTo/b/[^/]+|moveTo)/o/([^/]+)$")
_LIST = re.compile(r"/b/([^/]+)/o$")
_BUCKET = re.compile(r"/b/([^/]+)$")


class _RefusedError(Exception):
    """Ends a request with an HTTP error status."""


class Buckets(http.server.ThreadingHTTPServer):
    """bucket -> name -> (content, generation), served over HTTP."""

    daemon_threads = True

    def __init__(self, *names):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets = {name: {} for name in names}
        self.uploads = {}
        self.numbers = itertools.count(1)
        self.lock = threading.RLock()
        self.changed = lambda name, content: None  # called after each change, before the response
        self.broken = False  # if set, every request is refused

    def handle_error(self, *_):
        """Ignores clients that disconnect, killed or done."""

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self):
        """Variables that point gcsfs, Google's client and TensorStore to this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "FSSPEC_GCS_TOKEN": "anon",
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "none",
            "NO_GCE_CHECK": "true",
        }

    def under(self, url):
        """Returns path -> content of the objects under gs://BUCKET/FOLDER."""
        bucket, _, folder = url.removeprefix("gs://").partition("/")
        with self.lock:
            return {
                name.removeprefix(f"{folder}/"): content
                for name, (content, _) in self.buckets[bucket].items()
                if name.startswith(f"{folder}/")
            }

    def put(self, url, content):
        """Writes an object; None deletes it."""
        bucket, _, name = url.removeprefix("gs://").partition("/")
        self.write(bucket, name, content)

    def read(self, bucket, name, conditions):
        with self.lock:
            content, generation = self._objects(bucket).get(name, (None, 0))
            if int(conditions.get("ifGenerationMatch", generation)) != generation:
                raise _RefusedError(412)
            if int(conditions.get("ifGenerationNotMatch", -1)) == generation:
                raise _RefusedError(304 if content is not None else 412)
            if content is None:
                raise _RefusedError(404)
            return content, generation

    def write(self, bucket, name, content, conditions=None):
        """Writes an object (None: deletes it) if the conditions hold; returns its resource."""
        with self.lock:
            objects = self._objects(bucket)
            generation = objects.get(name, (None, 0))[1]
            if int((conditions or {}).get("ifGenerationMatch", generation)) != generation:
                raise _RefusedError(412)
            if content is None:
                if name not in objects:
                    raise _RefusedError(404)
                del objects[name]
                found = {}
            else:
                objects[name] = (content, next(self.numbers))
                found = self.resource(bucket, name)
        self.changed(name, content)
        return found

    def resource(self, bucket, name):
        content, generation = self.buckets[bucket][name]
        digest = hashlib.md5(content).digest()
        crc32c = google_crc32c.value(content).to_bytes(4, "big")
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "md5Hash": base64.b64encode(digest).decode(),
            "crc32c": base64.b64encode(crc32c).decode(),
            "etag": str(generation),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "storageClass": "STANDARD",
            "contentType": "application/octet-stream",
        }

    def listing(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        entries = {}
        with self.lock:
            for name in self._objects(bucket):
                key = name
                if not name.startswith(prefix):
                    continue
                if not query.get("startOffset", "") <= name < query.get("endOffset", chr(0x10FFFF)):
                    continue
                if delimiter and delimiter in name[len(prefix) :]:
                    key = prefix + name[len(prefix) :].split(delimiter)[0] + delimiter
                entries[key] = key == name
            names = sorted(name for name in entries if name > query.get("pageToken", ""))
            page = names[: min(PAGE, int(query.get("maxResults", PAGE)))]
            found = {
                "kind": "storage#objects",
                "items": [self.resource(bucket, name) for name in page if entries[name]],
                "prefixes": [name for name in page if not entries[name]],
            }
        return found | ({"nextPageToken": page[-1]} if len(page) < len(names) else {})

    def _objects(self, bucket):
        if bucket not in self.buckets:
            raise _RefusedError(404)
        return self.buckets[bucket]


@contextlib.contextmanager
def serving(*names):
    """Serves buckets of these names for the duration of the block."""
    with Buckets(*names) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_any(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path, _, query = self.path.partition("?")
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        try:
            if self.server.broken:
                raise _RefusedError(403)
            self.answer(path, body)
        except _RefusedError as refused:
            message = {"error": {"code": refused.args[0], "message": "refused"}}
            empty = refused.args[0] == 304
            self.reply(b"" if empty else json.dumps(message).encode(), refused.args[0])

    do_GET = do_POST = do_PUT = do_DELETE = do_any  # noqa: N815  http.server's names

    def reply(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def reply_json(self, value, **headers):
        self.reply(json.dumps(value).encode(), Content_Type="application/json", **headers)

    def answer(self, path, body):
        server, unquote = self.server, urllib.parse.unquote
        if path.startswith("/upload/"):
            self.upload(unquote(_LIST.search(path)[1]), body)
        elif found := _COPY.search(path):
            self.copy(*map(unquote, found.groups()))
        elif found := _OBJECT.search(path):
            bucket, name = map(unquote, found.groups())
            if self.command == "DELETE":
                server.write(bucket, name, None, self.query)
                self.reply(b"", 204)
            elif self.query.get("alt") == "media":
                self.download(*server.read(bucket, name, self.query))
            else:
                server.read(bucket, name, self.query)
                self.reply_json(server.resource(bucket, name))
        elif found := _LIST.search(path):
            self.reply_json(server.listing(unquote(found[1]), self.query))
        elif (found := _BUCKET.search(path)) and found[1] in server.buckets:
            self.reply_json({"kind": "storage#bucket", "name": found[1], "id": found[1]})
        else:
            raise _RefusedError(404)

    def download(self, content, generation):
        status, headers = 200, {"x_goog_generation": str(generation)}
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size = len(content)
            first, last = wanted.groups()
            start = int(first) if first else max(0, size - int(last))
            stop = min(size, int(last) + 1) if first and last else size
            if start >= size:
                raise _RefusedError(416)
            content, status = content[start:stop], 206
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.reply(content, status, **headers)

    def upload(self, bucket, body):
        kind, name = self.query.get("uploadType"), self.query.get("name")
        if "upload_id" in self.query:
            self.upload_part(self.query["upload_id"], body)
            return
        if kind == "resumable":
            key = str(next(self.server.numbers))
            name = name or json.loads(body)["name"]
            self.server.uploads[key] = (bucket, name, self.query, bytearray())
            place = f"{self.server.address}{self.path}&upload_id={key}"
            self.reply(b"", Location=place)
            return
        if kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\"; ]+)", self.headers["Content-Type"])[1]
            _, first, second, _ = re.split(rb"\r?\n?--" + re.escape(boundary.encode()), body)
            parts = [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (first, second)]
            name, body = name or json.loads(parts[0])["name"], parts[1]
        self.reply_json(self.server.write(bucket, name, body, self.query))

    def upload_part(self, key, body):
        bucket, name, conditions, content = self.server.uploads[key]
        content += body
        total = self.headers.get("Content-Range", "bytes */*").rpartition("/")[2]
        if total == "*":
            self.reply(b"", 308, Range=f"bytes=0-{len(content) - 1}")
            return
        assert int(total) == len(content)
        self.reply_json(self.server.write(bucket, name, bytes(content), conditions))

    def copy(self, bucket, name, how, target):
        target_bucket = how.rpartition("/")[2] if "/" in how else bucket
        with self.server.lock:
            content, _ = self.server.read(bucket, name, {})
            made = self.server.write(target_bucket, target, content, self.query)
            if how == "moveTo":
                self.server.write(bucket, name, None)
        size = str(len(content))
        self.reply_json(
            made
            if how == "moveTo"
            else {"done": True, "objectSize": size, "totalBytesRewritten": size, "resource": made}
        )
