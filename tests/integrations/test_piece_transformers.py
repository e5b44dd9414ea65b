"""`examples/piece_transformers.py`: PIECE on a causal language model of transformers, with batches as dicts.

Exactly the asked share of the entries trains, the loss falls, and the delta alone turns the first model into the last.
"""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "piece_transformers.py"


def test_a_causal_model_learns_with_a_share_of_its_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE))["main"](["--steps", "20", "--ratio", "0.02", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", printed))
    assert last < 0.9 * first
    counts = re.search(r"([\d,]+) of ([\d,]+) entries trained; the delta restores them: (\w+)", printed)
    trained, every = (int(counts[place].replace(",", "")) for place in (1, 2))
    assert trained == int(0.02 * every)
    assert counts[3] == "True"
    size = (tmp_path / "piece-transformers.safetensors").stat().st_size
    assert size < 12 * trained + 4000  # a position and a value each, and names
