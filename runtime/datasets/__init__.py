"""Demonstrations of every format, encoded and decoded as a whole.

Readers, which the reference uses too:

- sources: opens a dataset of any format; source_base: what all sources have in common, and steps, episodes and files
  as they hand them on
- npz, with array_layouts: .npz and .npy; hdf5; lerobot: LeRobot and Parquet
- episodes: checks that need all steps; errors

A conversion to tokens, or back:

- tokenize: the command; conversion: does the work; progress: how far it is
- rows: what a row holds, of a step or of a chunk; chunks: a source's chunks as rows; coding: codes rows
- job: a conversion as parts; job_folder: `OUT.partial`; parts: makes a part, and says that it is whole
- writers: parts as Parquet or Zarr; action_files: actions as .npz or HDF5
- finish: verifies, and renames to OUT; ray: the same job on a cluster

What comes out:

- format: the layout on disk and `dataset.json`; token_reader: opens it and verifies it
"""
