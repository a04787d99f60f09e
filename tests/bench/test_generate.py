import json

from clipjax.cli import main


def test_generation_is_measured_with_and_without_a_cache(capsys):
    sizes = "--tokens 3 --batch 2 --layers 2 --width 16 --heads 2 --queries 3 --vocabulary 20"
    assert main(["bench", "generate", *sizes.split(), "--rounds", "1", "--prefix", "--json"]) == 0
    out = capsys.readouterr().out
    results = json.loads(out.splitlines()[-1])
    seconds = results["seconds"]
    assert set(seconds) == {"cached", "uncached", "prefix"} and results["same_tokens"]
    assert results["speedup"] == seconds["uncached"] / seconds["cached"]
    assert results["cached_tokens_per_second"] == 6 / seconds["cached"]
    assert "tokens are the same" in out
    assert main(["bench", "generate", "--layers", "3"]) == 2
    assert "layers=3 must be even" in capsys.readouterr().err
