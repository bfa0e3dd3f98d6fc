"""Small token files and slow, literal readings of the published rules, for comparison."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megafp4.data.indexed import IndexedDataset
from megafp4.data.indexed_writer import IndexedWriter


def write_pair(prefix: Path, documents: Sequence[Sequence[int]], dtype="<u2") -> IndexedDataset:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(np.asarray(document, np.int64))
    return IndexedDataset(prefix)


def numbered(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of the given lengths whose tokens are 0, 1, 2, ... so that each can be told."""
    documents, first = [], 0
    for length in lengths:
        documents.append(list(range(first, first + length)))
        first += length
    return documents


def walk_samples(lengths, document_index, seq_len, samples):
    """The sample index by walking token counts, document after document, as Megatron does."""
    index = [(0, 0)]
    position, offset = 0, 0
    for _ in range(samples):
        remaining = seq_len + 1
        while remaining:
            available = int(lengths[document_index[position]]) - offset
            if available >= remaining:
                offset += remaining - 1
                remaining = 0
            elif position == len(document_index) - 1:
                offset = int(lengths[document_index[position]]) - 1
                remaining = 0
            else:
                remaining -= available
                position, offset = position + 1, 0
        index.append((position, offset))
    return np.array(index)
