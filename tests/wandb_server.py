"""A W&B server on this machine, for tests of online runs."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

API_KEY = "a" * 40


class Server(ThreadingHTTPServer):
    """As much of a W&B server as one run needs: it keeps the history lines and can refuse everything from now on."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lines: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.stopped = False
        self._thread = threading.Thread(target=self.serve_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bucket(self, name: str) -> dict[str, Any] | None:
        if not self.lines:
            return None
        tail = json.dumps([json.dumps(self.lines[-1])])
        counts = {"historyLineCount": len(self.lines), "logLineCount": 0, "eventsLineCount": 0}
        empty = {"summaryMetrics": "{}", "eventsTail": "[]", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'}
        return {"id": "b", "name": name, "displayName": "n", "notes": "", "historyTail": tail} | counts | empty

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/stop":
            self.stopped = True
        if path.endswith("/file_stream"):
            stream = json.loads(body)
            content = stream.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.lines += [json.loads(line) for line in content]
            if "exitcode" in stream:
                self.exit_codes.append(stream["exitcode"])
        if path != "/graphql":
            return {}
        request = json.loads(body)
        query, name = request["query"], request["variables"].get("name")
        entity = {"id": "e", "name": "me"}
        if "RunResumeStatus" in query:
            return {"data": {"model": {"id": "m", "name": "p", "entity": entity, "bucket": self.bucket(name)}}}
        if "UpsertBucket" in query:
            bucket = {"id": "b", "name": name, "displayName": "n", "config": "{}", "historyLineCount": len(self.lines)}
            project = {"id": "p", "name": "p", "entity": entity}
            return {"data": {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": not self.lines}}}
        if "CreateRunFiles" in query:
            return {"data": {"createRunFiles": {"runID": "n", "uploadHeaders": [], "files": []}}}
        return {"data": {}}


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(503 if self.server.stopped else 200)
        text = json.dumps(self.server.answer(self.path, body)).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass
