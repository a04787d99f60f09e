import json

from clipjax.cli import main


def test_two_kills_of_two_processes_change_no_figure(capsys, monkeypatch):
    """Two processes of two devices each; the losses are those of a run that nobody disturbed, bit for bit."""
    assert main(["bench", "survive", "--kills", "2", "--seed", "1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["kills"] == 2
    assert results["starts"] >= 2
    assert results["figures"] > results["steps"]
    assert results["different"] == results["beyond_the_last_save"] == 0
    assert main(["bench", "survive", "--kills", "0"]) == 2
    assert "kills=0 must be positive" in capsys.readouterr().err
