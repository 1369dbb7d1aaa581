"""Objects of an S3 bucket, at Amazon or at any server that speaks S3's interface.

One blocking client a process, by botocore: threads may share it, no event loop is needed, and
nothing is cached, so that a reader sees what another process has just written. Who is asked, and
with whose account, comes from the environment alone, as for all programs that speak S3:
`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, a profile, or
the role of the workload.

Whatever goes wrong is an OSError with one sentence. Of a server's answer it quotes only the code.
"""

from __future__ import annotations

import functools
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
)

#: Seconds to wait for a connection and for an answer, and how often: a poll of a store that is
#: away ends within a minute.
CONNECT, ANSWER, TRIES = 5, 10, 3
#: Files above `WHOLE` bytes go up in parts of `PART` bytes, of which S3 takes `MOST`.
WHOLE, PART, MOST = 64 << 20, 32 << 20, 10_000
#: Bytes of a download held in memory at once.
_CHUNK = 1 << 20
#: How a server says that the bucket lies in another region; a look-up brings only the status.
_ELSEWHERE = ("301", "400", "PermanentRedirect", "AuthorizationHeaderMalformed")
#: The metadata by which a writer knows its own object.
_WRITER = "writer"
#: Buckets that have been seen to refuse to write over an object, by endpoint and name.
_exclusive: set[tuple[str, str]] = set()
# It tells each process where it found its credentials, and in detail what it signs with them.
logging.getLogger("botocore").setLevel(logging.WARNING)


class Bucket:
    """The objects below a prefix of a bucket.

    Args:
        uri: `s3://bucket` or `s3://bucket/prefix`.
    """

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        if not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "a store on S3 is named s3://BUCKET or s3://BUCKET/PREFIX, without credentials"
            )
        self.uri = uri
        self.name = parts.netloc
        self._prefix = f"{parts.path.strip('/')}/".lstrip("/")

    def read(self, key: str) -> bytes:
        """The content of an object. Raises FileNotFoundError."""
        with self._asked("read", key) as client:
            return b"".join(_content(client, self._named(key)))

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a file. Raises FileNotFoundError."""
        with self._asked("read", key) as client, path.open("wb") as file:
            for chunk in _content(client, self._named(key)):
                file.write(chunk)

    def write(self, key: str, content: bytes) -> None:
        """Put an object, replacing what was there."""
        with self._asked("write", key) as client:
            client.put_object(**self._named(key), Body=content)

    def upload(self, key: str, path: Path) -> None:
        """Put a file; a large one goes in parts and appears with the last of them."""
        with self._asked("write", key) as client, path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= WHOLE:
                client.put_object(**self._named(key), Body=file)
            else:
                _upload_parts(client, self._named(key), file, max(PART, -(-size // MOST)))

    def create(self, key: str, content: bytes) -> None:
        """Put an object only if there is none. Raises FileExistsError otherwise."""
        writer = uuid.uuid4().hex
        with self._asked("create", key) as client:
            if not self._put_new(client, key, content, writer):
                raise FileExistsError(f"{self.uri}/{key}")
            endpoint = (client.meta.endpoint_url, self.name)
            if endpoint in _exclusive:
                return
            # A server that does not know the condition ignores it, and then two writers could
            # both win. So the first object is put twice.
            if self._refused(client, key, content, writer) is None:
                raise OSError(
                    f"{self._place} ignores If-None-Match, so that two writers could both change "
                    "what serves; use a store with conditional writes"
                )
            _exclusive.add(endpoint)

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        with self._asked("look up", key) as client:
            return self._head(client, key) is not None

    def list(self, folder: str) -> list[str]:
        """Keys of all objects below a folder."""
        prefix = f"{self._prefix}{folder}/" if folder else self._prefix
        with self._asked("list", folder) as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self.name, Prefix=prefix
            )
            keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        # Some tools mark a folder by an empty object.
        return [k.removeprefix(self._prefix) for k in keys if not k.endswith("/")]

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        with self._asked("delete", key) as client:
            client.delete_object(**self._named(key))

    def _named(self, key: str) -> dict[str, str]:
        return {"Bucket": self.name, "Key": f"{self._prefix}{key}"}

    def _head(self, client: Any, key: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = client.head_object(**self._named(key))
        except ClientError as error:
            if _status(error) == 404:
                return None
            raise
        return found

    def _put_new(self, client: Any, key: str, content: bytes, writer: str) -> bool:
        """Whether this writer put the object."""
        for _ in range(TRIES):
            status = self._refused(client, key, content, writer)
            if status != 409:  # S3: another is at it just now; try again
                break
        if status is None:
            return True
        # An answer may have been lost, and botocore has tried again: then it is our own object
        # that is in the way.
        found = self._head(client, key)
        if found is None:
            raise ConnectionError(f"{self._place} is busy with {key!r}; try again later")
        return bool(found["Metadata"].get(_WRITER) == writer)

    def _refused(self, client: Any, key: str, content: bytes, writer: str) -> int | None:
        """Put the object if there is none: None, or the status by which that is refused."""
        try:
            client.put_object(
                **self._named(key), Body=content, IfNoneMatch="*", Metadata={_WRITER: writer}
            )
        except ClientError as error:
            if _status(error) not in (409, 412):
                raise
            return _status(error)
        return None

    @property
    def _place(self) -> str:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        host = endpoint.partition("//")[2].partition("/")[0].rpartition("@")[2]
        return f"the store {self.uri} at {host}" if host else f"the store {self.uri}"

    @contextmanager
    def _asked(self, what: str, key: str) -> Iterator[Any]:
        """The client; what it raises becomes an OSError."""
        try:
            yield connect()
        except ClientError as error:
            raise self._answer(error, what, key) from None
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
            _client.cache_clear()  # they may come later
            raise PermissionError(
                f"no credentials for {self._place} ({type(error).__name__}): set AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the workload a role"
            ) from None
        except CredentialRetrievalError:
            raise PermissionError(
                f"credentials for {self._place} cannot be fetched; check the role of the workload"
            ) from None
        except (ConnectTimeoutError, ReadTimeoutError):
            raise TimeoutError(
                f"{self._place} does not answer in time; check AWS_ENDPOINT_URL and the network"
            ) from None
        except BotoCoreError as error:
            raise ConnectionError(
                f"{self._place} cannot be reached ({type(error).__name__}); check "
                "AWS_ENDPOINT_URL and the network"
            ) from None

    def _answer(self, error: ClientError, what: str, key: str) -> OSError:
        code, status = error.response.get("Error", {}).get("Code", ""), _status(error)
        if code == "NoSuchBucket":
            return OSError(
                f"{self._place}: there is no bucket {self.name}; create it, or correct "
                "DRIFTMILL_STORE"
            )
        if code == "NoSuchKey" or (status == 404 and code in ("404", "NotFound")):
            return FileNotFoundError(f"{self.uri}/{key}")
        if code == "RequestTimeTooSkewed":
            return PermissionError(f"{self._place} has another time; set this machine's clock")
        if status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
            return PermissionError(
                f"{self._place} does not let this account {what} {key!r} ({code}); check the "
                "credentials and the account's policy"
            )
        if status >= 500 or code in ("SlowDown", "RequestTimeout"):
            return ConnectionError(
                f"{self._place} could not {what} {key!r} ({code}); try again later"
            )
        hint = "check AWS_REGION and the name" if code in _ELSEWHERE else "see the store's own log"
        return OSError(f"{self._place} refuses to {what} {key!r} ({code}); {hint}")


def connect() -> Any:
    """botocore's client of this process. Raises BotoCoreError, OSError."""
    return _client(os.getpid())


@functools.lru_cache(maxsize=1)
def _client(process: int) -> Any:
    """The client of this process: one from before a fork would share its connections."""
    try:
        return botocore.session.get_session().create_client(
            "s3",
            # botocore knows AWS_DEFAULT_REGION; Kubernetes and all other SDKs set this one.
            region_name=os.environ.get("AWS_REGION"),
            config=Config(
                connect_timeout=CONNECT,
                read_timeout=ANSWER,
                retries={"mode": "standard", "total_max_attempts": TRIES},
                tcp_keepalive=True,
                # Checksums in trailers are new, and not every server knows them. The signature
                # covers the content where TLS does not.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
    except ValueError:  # botocore quotes the URL, which may hold a password
        raise OSError("AWS_ENDPOINT_URL is not a URL such as https://s3.example.org") from None


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _content(client: Any, named: dict[str, str]) -> Iterator[bytes]:
    """An object's bytes. botocore tries requests again, not bodies that break off: those go on
    where they broke, if it is still the same object."""
    answer = client.get_object(**named)
    done, tries = 0, TRIES
    while True:
        try:
            for chunk in answer["Body"].iter_chunks(_CHUNK):
                done += len(chunk)
                yield chunk
        except (HTTPClientError, IncompleteReadError):
            tries -= 1
            if not tries:
                raise
            answer = client.get_object(**named, Range=f"bytes={done}-", IfMatch=answer["ETag"])
        else:
            return


def _upload_parts(client: Any, named: dict[str, str], file: Any, part: int) -> None:
    upload = {**named, "UploadId": client.create_multipart_upload(**named)["UploadId"]}
    parts: list[dict[str, Any]] = []
    done = False
    try:
        while content := file.read(part):
            number = len(parts) + 1
            sent = client.upload_part(**upload, PartNumber=number, Body=content)
            parts.append({"PartNumber": number, "ETag": sent["ETag"]})
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        done = True
    finally:
        if not done:  # parts that nobody sees cost money all the same
            client.abort_multipart_upload(**upload)
