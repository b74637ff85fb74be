#!/usr/bin/env python3
"""Fold batch normalization out of an ONNX model: `python tools/fold_onnx.py IN [OUT] ...` is `fastbn fold IN [OUT] ...`."""

import sys

from fastbn.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["fold", *sys.argv[1:]]))
