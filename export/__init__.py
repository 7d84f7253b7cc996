"""From a trained checkpoint to a validated bundle: ONNX graphs, engines, parity gates.

The command and its steps:

- build_engine: the command; pipeline: a build from a checkpoint; on_target: `--from-bundle`, without torch
- sources: checkpoint, mode and episodes; progress: the list of steps that a person watches
- bundle_writer: writes a bundle beside its place and renames it; fingerprint: the identity of a tokenizer

What is generated:

- plan: the arithmetic, folded; graphs: ONNX of it; c_source, cuda_source: sources of it; source_tables: their numbers
- engines: compiles what this machine can, with c_builder and trt_builder

How it is judged:

- reference: answers in float64; parity_data: actions to judge on; golden_inputs: those that show a wrong constant
- graph_check: graphs against golden vectors; parity: engines against the reference, gate by gate
- proving: opens the bundle as the robot would, lets a judge look, and seals it; errors: what all of them raise
"""
