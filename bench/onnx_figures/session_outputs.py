"""Runs in another environment (numpy and onnxruntime alone): what graphs give, into one file.

    python session_outputs.py JOBS.json OUT.npz

JOBS has for each name: the graph, and either a file of feeds (.npz) or the ids of a prompt, which
is continued greedily through the graph's cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from greedy import by_graph


def main() -> None:
    """Run every job."""
    found = {"version": np.array(onnxruntime.__version__)}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
        graph = onnxruntime.InferenceSession(
            job["graph"], options, providers=["CPUExecutionProvider"]
        )
        if "prompt" in job:
            found[name] = np.array(by_graph(graph, job["prompt"]))
        else:
            found[name] = graph.run(None, dict(np.load(job["feeds"])))[0]
    np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    main()
