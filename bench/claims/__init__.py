"""The claims of EPI and PIECE, run again at a scale that two cores can afford. `python -m claims --help`, in bench/."""

import sys
from pathlib import Path

# the model and some of the text are those of the examples
sys.path.insert(1, str(Path(__file__).parents[2] / "examples"))
