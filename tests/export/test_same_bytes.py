"""Everything that is generated is the same to the byte in another process, another folder, with another hash seed."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from rfsq.export.chunk_belief_graphs import chunk_belief_graph
from rfsq.export.chunk_graphs import chunk_decoder_graph, chunk_encoder_graph
from rfsq.export.graph_builder import BELIEF_FORMS, LinearForm
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from tests.bundles import Recipe, deploy, export_graphs, generate_c, generate_cuda
from tests.export.chunk_models import random_plan
from tests.export.plan_numpy import MODES

ROOT = Path(__file__).parents[2]
PRINT_HASHES = """
import json
from tests.export.test_same_bytes import hashes
print(json.dumps(hashes()))
"""


def hashes() -> dict[str, str]:
    """SHA-256 of every text and graph, in every mode, and of chunk tokens."""
    found = {}
    for mode in MODES:
        deployed = deploy(Recipe(mode=mode))
        c = generate_c(deployed)
        texts = {"header": c.header, "source": c.source, "CUDA": generate_cuda(deployed)}
        contents = export_graphs(deployed) | {name: text.encode() for name, text in texts.items()}
        found |= {f"{mode.value} {name}": hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    chunk_plan = random_plan(ChunkSizes(2, 3, num_tokens=10), seed=0)
    for form in LinearForm:
        graphs = {"encoder": chunk_encoder_graph(chunk_plan, form), "decoder": chunk_decoder_graph(chunk_plan, form)}
        if form in BELIEF_FORMS:
            graphs["belief"] = chunk_belief_graph(chunk_plan, form)
        found |= {f"chunk {form} {name}": hashlib.sha256(content).hexdigest() for name, content in graphs.items()}
    return found


def test_two_processes_in_two_folders_write_the_same_bytes(tmp_path: Path) -> None:
    """This one is the first."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "1"}
    other = subprocess.run(
        [sys.executable, "-c", PRINT_HASHES], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert other.returncode == 0, other.stderr
    here = hashes()
    # And graphs of beliefs: one for each prefix, but where tokens need statistics, and one of chunk tokens.
    beliefs = len(BELIEF_FORMS) * (2 * (len(MODES) - 1) + 1)
    assert len(here) == (3 * len(LinearForm) + 3) * len(MODES) + 2 * len(LinearForm) + beliefs
    assert len(set(here.values())) == len(here)
    assert json.loads(other.stdout) == here
