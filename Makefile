# The commands of a working day. PYTHON is any Python 3.11+ with the build requirements of pyproject.toml installed.
PYTHON ?= python3

.PHONY: build test print-array-tests print-graph-tests docs sanitize races analyze coverage neon lint format clean

# Kernels alone, for a target without Python, with their preconditions checked.
KERNELS = src_c/*.c tests/check_bits.c
KERNEL_FLAGS = -std=c11 -O2 -DFASTBN_DEBUG -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Isrc_c

build:
	$(PYTHON) setup.py build_ext --inplace

test: build
	$(PYTHON) -m pytest

# Tests of the arrays, which need neither onnx nor onnxruntime.
ARRAY_TESTS = $(patsubst %,tests/test_%.py,addresses affine batch_norm check config copies exchange functional kernel_numerics kernels layers \
  memory plain_arrays random_calls stats stress threads wide)
print-array-tests:
	@echo $(ARRAY_TESTS)

# Tests of models that are read, planned, written and compared, for a sanitizer: they take minutes, and need no more memory than a machine has.
GRAPH_TESTS = $(patsubst %,tests/test_%.py,absorb broken_models carry comparable consistency deploy expressions hostile_models loops nesting \
  odd_nodes places probe quantized reestimate refusals rewrite sequences shapes sizes storage survival transfers verify wrong_nodes)
print-graph-tests:
	@echo $(GRAPH_TESTS)

# The pages, with the reference of every public name, in build/docs. Needs the group `docs` of pyproject.toml, and PyTorch.
docs:
	$(PYTHON) -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs

# The test-suite, or TESTS of it, over a build with one sanitizer (address, undefined or thread) and with the preconditions of the kernels
# checked. Python itself is not instrumented, so the library of the sanitizer is preloaded, and that of C++, whose exceptions it has to find. -fno-wrapv undoes Python's
# own -fwrapv, which would make every overflow of an integer defined; the first report, which pytest must not capture, ends the process with
# another exit code than 0.
SANITIZER ?= address
TESTS ?=
SANITIZER_FLAGS = -O1 -g -DFASTBN_DEBUG -fno-wrapv -fsanitize=$(SANITIZER) -fno-sanitize-recover=all
SANITIZER_LIBRARIES = $(foreach name,$(patsubst address,asan,$(patsubst undefined,ubsan,$(patsubst thread,tsan,$(SANITIZER)))) stdc++,\
  $(shell $(CC) -print-file-name=lib$(name).so))
sanitize:
	mkdir -p build/$(SANITIZER)/lib
	cp -r fastbn build/$(SANITIZER)/lib/
	FASTBN_CFLAGS="$(SANITIZER_FLAGS)" $(PYTHON) setup.py build_ext --force --build-temp build/$(SANITIZER) --build-lib build/$(SANITIZER)/lib
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:die_after_fork=0 PYTHONMALLOC=malloc \
	LD_PRELOAD="$(SANITIZER_LIBRARIES)" \
	PYTHONPATH=build/$(SANITIZER)/lib $(PYTHON) -P -m pytest -x --capture=sys -p no:cacheprovider $(TESTS)

# The same bits under NEON as here, with a cross compiler and user-mode emulation.
AARCH64_CC ?= aarch64-linux-gnu-gcc
AARCH64_RUN ?= qemu-aarch64-static
neon:
	mkdir -p build/neon
	$(CC) $(KERNEL_FLAGS) $(KERNELS) -o build/neon/here -lpthread -lm
	$(AARCH64_CC) $(KERNEL_FLAGS) -static $(KERNELS) -o build/neon/there -lpthread -lm
	build/neon/here > build/neon/here.txt
	$(AARCH64_RUN) build/neon/there > build/neon/there.txt
	diff build/neon/here.txt build/neon/there.txt

# The pool of threads under ThreadSanitizer, which knows nothing of Python's own locks; then with forks, which it does not follow.
races:
	mkdir -p build/races
	$(CC) $(KERNEL_FLAGS) -O1 -g -fsanitize=thread src_c/*.c tests/check_threads.c -o build/races/watched -lpthread -lm
	$(CC) $(KERNEL_FLAGS) src_c/*.c tests/check_threads.c -o build/races/plain -lpthread -lm
	TSAN_OPTIONS=halt_on_error=1 build/races/watched 8 1
	build/races/plain 8 4 200

# Static checks; the instruction sets are one source with other macros, so that the scalar one stands for all. What clang-tidy leaves out
# stands in .clang-tidy. cppcheck takes a cast of a pointer for a change of byte order (invalidPointerCast), and vectors of one number, made
# by macros, for pointers (ctunullpointer); gcc 12 believes that a loop over 1 or 3 of 3 places may read a fourth.
ANALYZED = $(filter-out src_c/isa_%,$(wildcard src_c/*.c)) src_c/isa_scalar.c
GCC_CHECKS = -Werror -Wconversion -Wsign-conversion -Wshadow -Wcast-align -Wcast-qual -Wstrict-prototypes -Wundef -Wpointer-arith -fanalyzer \
  -Wno-analyzer-use-of-uninitialized-value
CPPCHECK_FLAGS = --quiet --std=c11 --enable=warning,portability,performance --error-exitcode=1 -Isrc_c --suppress=missingIncludeSystem \
  --suppress=invalidPointerCast --suppress=ctunullpointer
analyze:
	for file in $(ANALYZED); do $(CC) $(KERNEL_FLAGS) $(GCC_CHECKS) -c $$file -o /dev/null || exit 1; done
	clang-tidy --quiet --warnings-as-errors='*' $(ANALYZED) -- -std=c11 -Isrc_c
	cppcheck $(CPPCHECK_FLAGS) $(ANALYZED)

# Lines and branches that the tests, or TESTS of them, run: Python by coverage.py, C by gcov. Needs coverage and gcovr. At the end stands what
# no test runs and docs/coverage.md does not explain: nothing after all tests with what `[test]` and the group `docs` install, PyTorch,
# onnxscript, JAX and pandas. A test that fails keeps no report back.
COVERED = build/coverage/lib
coverage:
	mkdir -p $(COVERED)
	tar -c --exclude='*.so' fastbn | tar -x -C $(COVERED)
	FASTBN_CFLAGS="-O0 --coverage -fprofile-update=atomic" $(PYTHON) setup.py build_ext --build-temp build/coverage --build-lib $(COVERED)
	find build/coverage -name "*.gcda" -delete
	$(PYTHON) -m coverage erase
	PYTHONPATH=$(COVERED) $(PYTHON) -P -m coverage run -m pytest -p no:cacheprovider $(TESTS); echo $$? > build/coverage/status
	$(PYTHON) -m coverage combine -q
	$(PYTHON) -m coverage json -q -o build/coverage/python.json
	$(PYTHON) -m coverage report --skip-covered
	gcovr --root . --object-directory build/coverage --filter src_c/ --txt-metric branch --txt - --json build/coverage/c.json
	$(PYTHON) tools/coverage_gaps.py build/coverage/python.json build/coverage/c.json
	exit $$(cat build/coverage/status)

lint:
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror src_c/*.c src_c/*.h src_c/*.inc tests/*.c tests/*.h

format:
	ruff check --fix .
	ruff format .
	clang-format -i src_c/*.c src_c/*.h src_c/*.inc tests/*.c tests/*.h

clean:
	rm -rf build dist docs/generated *.egg-info fastbn/_native.c fastbn/*.so
