"""What people read of an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.errors import show
from compress.export_onnx.builder import DATA_FILE


def lines_of(section: Mapping[str, Any]) -> list[str]:
    """The section of the report as lines: operators, bytes, the proof, what stayed dense."""
    parity = section["parity"]
    operators = ", ".join(f"{count} {name}" for name, count in section["operators"].items())
    found = [
        f"onnx: opset {section['opset']}, {operators or 'no compressed weights'}",
        f"onnx: graph {section['graph_bytes']:,} bytes; reads {section['shared_bytes']:,} of the"
        f" weight files and {section['data_bytes']:,} of {DATA_FILE}",
        f"onnx: outputs {parity['relative_error']:.2g} from our decode"
        f" ({parity['exact_relative_error']:.2g} with exact products, cosine"
        f" {parity['cosine']:.6f}, {parity['inputs']} inputs)",
    ]
    found += [
        f"onnx: {show(one['name'])} is dense in the graph: {one['why']}" for one in section["dense"]
    ]
    return found + [f"onnx: {note}" for note in section["notes"]]
