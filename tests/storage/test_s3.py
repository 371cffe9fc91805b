"""The same against a real S3 server on loopback."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from arena.storage.manifest import NAME
from arena.storage.remote import Store
from tests.storage.faulty import PLACE, Messages, checkpoint, evaluation, mirror, steps

URL = "s3://bucket/runs"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedMotoServer]:
    """A server with an empty bucket, and the surroundings that point to it. Servers of one process share content."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1", "AWS_MAX_ATTEMPTS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    for each in client.list_buckets()["Buckets"]:
        for key in objects():
            client.delete_object(Bucket=each["Name"], Key=key)
        client.delete_bucket(Bucket=each["Name"])
    client.create_bucket(Bucket="bucket")
    yield server
    server.stop()


def objects() -> dict[str, bytes]:
    client = boto3.client("s3")
    found = client.list_objects_v2(Bucket="bucket").get("Contents", [])
    return {each["Key"]: client.get_object(Bucket="bucket", Key=each["Key"])["Body"].read() for each in found}


def test_sent_pruned_and_fetched(tmp_path: Path, server: ThreadedMotoServer) -> None:
    run, fresh, messages = tmp_path / "run", tmp_path / "fresh", Messages()
    old = checkpoint(tmp_path / "elsewhere", 5)
    Store(URL, PLACE).put(old, f"checkpoints/{old.name}")
    (run / "checkpoints").mkdir(parents=True)
    (run / "log.jsonl").write_text("{}\n")
    sender = mirror(tmp_path, URL, messages)
    for number, loss in ((10, 0.5), (20, 0.7)):
        step = checkpoint(run, number, loss)
        sender.push(step, best=number == 10, files=[run / "log.jsonl"])
        sender.push(evaluation(step))
    assert sender.close(20) == [] and messages == []
    kept = objects()
    assert not any("step-00000005" in key or "writable" in key for key in kept)
    assert kept[f"runs/{PLACE}/checkpoints/step-00000010/deep/optimizer.safetensors"] == b"optimizer" * 5
    assert steps(mirror(tmp_path, URL).pull(fresh)) == [20, 10]
    for path in fresh.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (run / path.relative_to(fresh)).read_bytes()


def test_cut_short_and_damaged(tmp_path: Path, server: ThreadedMotoServer) -> None:
    store, client = Store(URL, PLACE), boto3.client("s3")
    for number in (1, 2, 3):
        store.put(checkpoint(tmp_path / "run", number), f"checkpoints/step-{number:08d}")
    at = f"runs/{PLACE}/checkpoints/step-0000000"
    client.delete_object(Bucket="bucket", Key=f"{at}3/{NAME}")
    client.put_object(Bucket="bucket", Key=f"{at}2/weights.safetensors", Body=b"x" * 48)
    messages = Messages()
    assert steps(mirror(tmp_path, URL, messages).pull(tmp_path / "fresh")) == [1]
    assert messages.about("step-00000003") == messages.about("step-00000002") == 1


def test_no_such_bucket_is_an_error_and_none_is_made(tmp_path: Path, server: ThreadedMotoServer) -> None:
    with pytest.raises(ValueError, match=r"train\.mirror=s3://bukcet/x cannot be written to"):
        mirror(tmp_path, "s3://bukcet/x")
    assert [each["Name"] for each in boto3.client("s3").list_buckets()["Buckets"]] == ["bucket"]


def test_a_server_that_stops_and_comes_back(tmp_path: Path, server: ThreadedMotoServer) -> None:
    messages = Messages()
    _, port = server.get_host_and_port()
    sender = mirror(tmp_path, URL, messages)
    server.stop()
    sender.push(checkpoint(tmp_path / "run", 1))
    deadline = time.monotonic() + 10
    while not messages:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert messages.about("fails") == 1
    again = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    again.start()
    try:
        assert sender.close(20) == [] and messages.about("works again") == 1
        assert steps(mirror(tmp_path, URL).pull(tmp_path / "fresh")) == [1]
    finally:
        again.stop()


def test_a_server_that_is_down_at_the_start(tmp_path: Path, server: ThreadedMotoServer) -> None:
    server.stop()
    messages = Messages()
    sender = mirror(tmp_path, URL, messages, patience=5)
    assert messages.about("does not answer") == 1
    assert sender.close(1) == []
