"""Stands for Kubeflow Pipelines' launcher in the pods of these tests.

It runs inside the component image, mounted where the real one lies, and does what that does for a
step: fetch the input artifacts from the bucket to the paths that the SDK expects, put the executor
input into the arguments, run them, take the outputs to the bucket. What the real one sends to ML
Metadata it prints as its last line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import botocore.session

#: Starts the line that says what a step has put out.
OUTPUT = "KFP-OUTPUT "


def main(arguments: list[str]) -> int:
    """Run `--executor_input JSON -- COMMAND...`; the exit code is that of the command."""
    executor_input = json.loads(arguments[arguments.index("--executor_input") + 1])
    command = arguments[arguments.index("--") + 1 :]
    client = botocore.session.get_session().create_client("s3")
    for artifact in _artifacts(executor_input.get("inputs", {})):
        _download(client, artifact["uri"])
    for artifact in _artifacts(executor_input["outputs"]):
        _path(artifact["uri"]).parent.mkdir(parents=True, exist_ok=True)
    ended = subprocess.run([word.replace("{{$}}", json.dumps(executor_input)) for word in command])
    if ended.returncode == 0:
        for artifact in _artifacts(executor_input["outputs"]):
            _upload(client, artifact["uri"])
        output = Path(executor_input["outputs"]["outputFile"])
        print(OUTPUT + json.dumps(json.loads(output.read_text()) if output.exists() else {}))
    return ended.returncode


def _artifacts(of: dict[str, Any]) -> list[dict[str, Any]]:
    return [a for many in of.get("artifacts", {}).values() for a in many["artifacts"]]


def _path(uri: str) -> Path:
    return Path("/s3", uri.removeprefix("s3://"))


def _download(client: Any, uri: str) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    found = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    for key in (entry["Key"] for entry in found):
        if key == prefix or key.startswith(prefix + "/"):
            path = _path(f"s3://{bucket}/{key}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())


def _upload(client: Any, uri: str) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    root = _path(uri)
    for path in [root, *root.rglob("*")]:
        if path.is_file():
            name = path.relative_to(root).as_posix()
            key = prefix if path == root else f"{prefix}/{name}"
            client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
