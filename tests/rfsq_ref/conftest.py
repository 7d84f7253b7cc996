"""Makes the helper modules beside the tests importable, whichever way pytest is started."""

import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
# Small matrices: more threads only wait for each other, and for whatever else runs.
torch.set_num_threads(1)
# No test judges time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
