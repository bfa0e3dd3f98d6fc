#!/usr/bin/env python3
"""Tokenize text files into a Megatron .bin/.idx pair: ``megafp4 data preprocess`` by its old name.

Example: tools/preprocess_data.py --input books.jsonl.gz notes/ --output data/books --tokenizer gpt2
"""

import sys

from megafp4.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "preprocess", *sys.argv[1:]]))
