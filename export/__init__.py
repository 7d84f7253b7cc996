"""From a trained checkpoint to a validated bundle: ONNX graphs, engines, parity gates.

The command and its steps:

- build_engine: the command; build_config: what it is asked for; pipeline: the phases of a build
- deployable: what a build deploys; step_tokens, chunk_tokens: either kind as such
- sources: checkpoint, mode and episodes
- on_target: `--from-bundle`, without torch; progress: the list of steps that a person watches
- bundle_writer: writes a bundle beside its place and renames it

What is generated:

- plan: the arithmetic, folded; graphs: ONNX of it, put together with graph_builder; c_source: C of it; cuda_source:
  CUDA of it; c_tables: tables and templates of both
- chunk_plan, chunk_graphs with chunk_builder and chunk_escape, chunk_c_source, chunk_cuda_source: the same of chunk
  tokens
- belief_graphs, chunk_belief_graphs: ONNX that decodes probabilities of tokens
- onnx_evaluator: runs a graph in numpy
- engines: compiles what this machine can, with c_builder

How it is judged:

- reference: actions to judge on, and answers to them in float64; golden_inputs: those that show a wrong constant
- chunk_reference: answers to chunks; chunk_sections: the chunks to judge on
- belief_vectors: probabilities of tokens, and what the definition makes of them
- parity: graphs against golden vectors, engines against the reference, gate by gate
- proving: opens the bundle as the robot would, lets a judge look, and seals it; errors: what all of them raise
"""
