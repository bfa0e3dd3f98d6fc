#!/usr/bin/env python3
"""Tokenize text files into a Megatron .bin/.idx pair; see megafp4.data.preprocess.

Example: tools/preprocess_data.py --input books.jsonl.gz notes/ --output data/books --tokenizer gpt2
"""

import argparse
import os
import sys

from megafp4.data.preprocess import preprocess
from megafp4.errors import MegaFP4Error


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help=".txt, .jsonl (both also .gz), .parquet files, folders of them, saved HF data sets",
    )
    parser.add_argument("--output", required=True, help="prefix of the .bin/.idx pair")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, gpt2 or a path")
    parser.add_argument("--key", default="text", help="JSON field or column that holds the text")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document id",
    )
    parser.add_argument("--separator", help="cuts .txt files into documents; default: one per file")
    parser.add_argument("--split", default="train", help="part of a saved HF DatasetDict")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


def main() -> None:
    """Tokenize what the command line names."""
    options = vars(parse())
    try:
        report = preprocess(options.pop("input"), options.pop("output"), **options)
    except MegaFP4Error as error:
        sys.exit(f"error: {error}")
    print(
        f"wrote {report.prefix}.bin and .idx: {report.documents} documents, {report.tokens} "
        f"tokens, {report.empty} empty documents left out"
    )


if __name__ == "__main__":
    main()
