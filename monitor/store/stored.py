"""Findings as they lie in a run folder: with the rule set that made them and the state of the engine after them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from monitor.store.layout import replacing
from monitor.store.parts import UNREADABLE, arrow, texts, write_table

if TYPE_CHECKING:
    from monitor.diagnosis.finding import Finding

_TYPES: dict[str, pa.DataType] = {
    "rule": pa.string(),
    "title": pa.string(),
    "severity": pa.string(),
    "site": pa.string(),
    "module": pa.string(),
    "attempt": pa.int64(),
    "first_step": pa.int64(),
    "last_step": pa.int64(),
    "peak_step": pa.int64(),
    "open": pa.bool_(),
    "count": pa.int64(),
    "value": pa.float64(),
    "threshold": pa.float64(),
    "evidence": pa.string(),
    "order": pa.int64(),
}
#: Columns of findings.parquet, the fields of `Finding`; ``evidence`` is JSON.
FINDINGS_SCHEMA = pa.schema([pa.field(name, t, nullable=False) for name, t in _TYPES.items()])


@dataclass(frozen=True)
class Stored:
    """Stored findings, the ``rules_hash`` of the rule set that made them, and the engine's ``state`` after them."""

    findings: list[Finding]
    state: dict[str, Any]
    rules_hash: str


def write_findings(path: Path, findings: Sequence[Finding], state: dict[str, Any], rules_hash: str) -> None:
    """Replace the stored findings at once.

    Raises:
        OSError: if they cannot be written; the old ones stay.
    """
    rows = [asdict(f) | {"evidence": json.dumps(f.evidence)} for f in findings]
    columns = []
    for name, t in _TYPES.items():
        values = [r[name] for r in rows]
        columns.append(texts(values) if t == pa.string() else arrow(np.array(values, dtype=t.to_pandas_dtype())))
    extra = {b"monitor.rules_hash": rules_hash.encode(), b"monitor.state": json.dumps(state).encode()}
    table = pa.Table.from_arrays(columns, schema=FINDINGS_SCHEMA)
    with replacing(path) as temp:
        # in the footer: what a schema says besides is written twice
        write_table(temp, [table], FINDINGS_SCHEMA, footer=lambda: extra)


def read_findings(path: Path) -> Stored:
    """What `write_findings` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or something else.
    """
    from monitor.diagnosis.finding import Finding
    from monitor.rule import SEVERITIES

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            if not schema.equals(FINDINGS_SCHEMA):
                raise ValueError("has other columns than stored findings")
            rows = file.read(use_threads=False).to_pylist()
            extra = file.metadata.metadata or {}
        rules_hash = extra[b"monitor.rules_hash"].decode()
        state = json.loads(extra[b"monitor.state"])
        evidence = [json.loads(r["evidence"]) for r in rows]
    except FileNotFoundError:
        raise
    except (*UNREADABLE, KeyError, RecursionError) as e:
        raise ValueError(f"{type(e).__name__}: {e}") from e
    if not isinstance(state, dict) or not all(
        isinstance(e, dict) and all(isinstance(v, int | float) for v in e.values()) for e in evidence
    ):
        raise ValueError("its evidence or state is not a mapping to numbers")
    if any(r["severity"] not in SEVERITIES for r in rows):
        raise ValueError("holds a severity that is none of " + ", ".join(SEVERITIES))
    return Stored([Finding(**(r | {"evidence": e})) for r, e in zip(rows, evidence, strict=True)], state, rules_hash)
