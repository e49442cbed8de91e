"""Rows of an embedding that have had no gradient since the start.

    never = rows whose running mean of gradients (or of their squares) has been 0 whenever it was looked at,
    frac = never / rows

The optimizer's memory of a row is exactly 0 until the row's first gradient; it is looked at every hundredth step, so a
row that fades back to 0 in between (a momentum of 0.9, a thousand steps) has been seen before. Weight decay moves such
rows all the same, but nothing is learnt for them. A row of a tied embedding has a gradient from the output in every
step. Of a sharded embedding only this process's rows count. Optimizers without such a memory (plain SGD) give nothing.

Healthy: frac falls quickly and then slowly, as rare tokens turn up; a row for padding never has a gradient.

Unhealthy: a large share for ever: the tokenizer has words that the data have not, or ids are cut or shifted on their
way to the model; for positions: sequences are shorter than the model can take, and what it does beyond is random.

Source: definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import per, recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The share, and what it is a share of."""
    return {
        "frac": per(block, "never", "rows"),
        "never": recorded(block, "never"),
        "rows": recorded(block, "rows"),
    }


def oracle() -> Iterable[Case]:
    """A quarter of 8 rows; none; no rows; not recorded."""
    yield Case(
        {"never": [[2], [0], [0], [None], [nan]], "rows": [[8], [8], [0], [None], [8]]},
        {
            "frac": [[0.25], [0], [None], [None], [nan]],
            "never": [[2], [0], [0], [None], [nan]],
            "rows": [[8], [8], [0], [None], [8]],
        },
        "2 of 8; of no rows there is no share",
        modules=("tokens.weight",),
    )


METRIC = Metric(
    id="embedding_rows",
    title="Embedding rows never updated",
    site="parameter",
    columns=(
        Column("frac", "fraction", "rows without a gradient so far"),
        Column("never", "count", "rows without a gradient so far"),
        Column("rows", "count", "rows of the embedding"),
    ),
    compute=compute,
    source="definition",
    cost="four columns of the optimizer's memory of every embedding, at every hundredth step and the tenth",
    plot=Plot("frac"),
    oracle=oracle,
    reads="embedding",
    doc=__doc__ or "",
)
