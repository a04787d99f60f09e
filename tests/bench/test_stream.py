"""`clipjax bench stream`, small: what it says of itself is so."""

import json

from clipjax.cli import main


def test_opening_and_going_on_after_a_kill(capsys):
    small = ["--files", "8", "--records", "30", "--batch_size", "16", "--batches", "2"]
    stream = ["--stream.lanes", "4", "--stream.run", "10", "--stream.block", "2"]
    assert main(["bench", "stream", *small, *stream, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["open"]
    assert found["records"] == 240 and found["first_batch"] < 60 and found["loader_mb"] < 1000
    assert main(["bench", "stream", "--kills", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["resume"]
    assert found["kills"] == found["changes"] == 1
    assert found["steps"] == 96 and found["wrong"] == found["lost"] == 0
