# The commands of a working day. PYTHON is any Python 3.11+ with the build requirements of pyproject.toml installed.
PYTHON ?= python3

.PHONY: build test lint format clean

build:
	$(PYTHON) setup.py build_ext --inplace

test: build
	$(PYTHON) -m pytest

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror src_c/*.c src_c/*.h

format:
	ruff check --fix .
	ruff format .
	clang-format -i src_c/*.c src_c/*.h

clean:
	rm -rf build dist *.egg-info fastbn/_native.c fastbn/*.so
