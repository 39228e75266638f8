# Every target sets up what it needs in .venv; a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin
, := ,
SOURCES := $(wildcard csrc/*.h csrc/*/*)
CXX_SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/cuda/*.cu csrc/cuda/*.cuh csrc/cuda/emulator/*.h \
  tests/cross/*.h tests/cross/*.cpp tests/cross/*/*.h tests/fuzz_kernels/*.h tests/fuzz_kernels/*.cpp)

.PHONY: help setup demo test test-fast lint format asan tsan cross fuzz fuzz-kernels bench bench-quality bench-onnx \
  large soak matrix installs audit cuda cuda-check clean

help:
	@echo "make demo    compress a real sentence encoder, verify it, compare embeddings"
	@echo "make test    the test suite"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make asan    the kernel tests with AddressSanitizer and UBSan (GCC)"
	@echo "make tsan    the kernel tests with ThreadSanitizer (GCC)"
	@echo "make cross   the kernel tests on NEON (QEMU) and emulated AVX-512 (SIMDe)"
	@echo "make fuzz-kernels  ten million inputs a kernel target, in slices (clang's libFuzzer)"
	@echo "make bench   speed, as ratios beside their goals (needs 6 GB of disk)"
	@echo "make bench-quality  quality beside its goals and beside the peers (3 GB of disk, half an hour)"
	@echo "make bench-onnx  the ONNX export: every figure beside its goal (8 GB of disk, half an hour)"
	@echo "make large   1 B and 8 B-shaped checkpoints (needs disk: 25 GB)"
	@echo "make soak    kills, signals, faults, damage, headers, determinism, memory (2 hours, 25 GB)"
	@echo "make fuzz    ten minutes of coverage-guided fuzzing of the readers (FUZZ_SECONDS=600)"
	@echo "make matrix  the tests on Python 3.10 to 3.13, newest and oldest dependencies (20 GB of disk)"
	@echo "make installs  sdist and wheel in empty environments, with and without a compiler (10 GB)"
	@echo "make audit   pip-audit over what is installed (needs the index's list of advisories)"
	@echo "make cuda    the CUDA kernels, into compress/kernels (needs nvcc)"
	@echo "make cuda-check  those, tested and timed on a device"

# The stamp says what was installed; it is rebuilt when the build's inputs change.
.venv/installed: pyproject.toml constraints.txt CMakeLists.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	touch $@

setup: .venv/installed

demo: .venv/installed
	$(BIN)/python samples/demo.py

# A worker a processor, and no more than four: each has torch in memory (up to 1.5 GB).
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: .venv/installed
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: .venv/installed
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# docs/sanitizers.md says what each option is for. The tests marked slow would take hours here.
KERNEL_TESTS := $(wildcard tests/test_kernels*.py tests/test_product*.py tests/test_obs.py)
sanitizer_build = PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/$@ -G Ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DCOMPRESS_SANITIZE=$(1) && \
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/$@
sanitized = COMPRESS_TEST_EXTENSION=$$(echo $(CURDIR)/build/$@/_cpu.*so) \
	PYTHONPATH=$(CURDIR)/tests/extension:$(CURDIR) \
	LD_PRELOAD="$$(gcc -print-file-name=$(1)) $$(gcc -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest -q --capture=sys -p no:cacheprovider -m "not slow" -k "not torch" \
	$(KERNEL_TESTS)

asan: .venv/installed
	$(call sanitizer_build,address$(,)undefined)
	PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(call sanitized,libasan.so)

tsan: .venv/installed
	$(call sanitizer_build,thread)
	OPENBLAS_NUM_THREADS=1 TSAN_OPTIONS="halt_on_error=1 die_after_fork=0" setarch -R env $(call sanitized,libtsan.so)

cross: .venv/installed
	COMPRESS_CROSS=1 $(BIN)/python -m pytest -s tests/test_cross_isa.py

# Goes on where the last one stopped; MINUTES=30 stops it early.
fuzz-kernels: .venv/installed
	$(BIN)/python bench/fuzz_kernels.py $(if $(MINUTES),--minutes $(MINUTES))

# Each prints its own tables and adds its figures to one file, which is printed in the end.
FIGURES := build/figures.json
bench: .venv/installed
	mkdir -p build && rm -f $(FIGURES)
	$(BIN)/python bench/products.py --json $(FIGURES)
	$(BIN)/python bench/products_sparse.py --json $(FIGURES)
	$(BIN)/python bench/kernels.py --json $(FIGURES)
	$(BIN)/python bench/obs.py --json $(FIGURES)
	$(BIN)/python bench/low_rank.py --json $(FIGURES)
	$(BIN)/python bench/runtime.py --json $(FIGURES)
	$(BIN)/python bench/goals.py $(FIGURES)

# The peers run in environments of their own (2.7 GB); then every figure of quality beside its goal.
bench-quality: .venv/installed
	$(BIN)/python bench/peers/environments.py --to build/peers
	$(BIN)/python bench/quality.py --json build/quality.json

# onnxruntime 1.24 and the newest run in environments of their own, in build/onnxruntime (0.5 GB).
bench-onnx: .venv/installed
	$(BIN)/python bench/onnx.py --json build/onnx.json

large: .venv/installed
	$(BIN)/python bench/large.py

# The kills go on where they were cut off. The table of memory wants 25 GB of disk.
SOAKED := build/soak.jsonl
soak: .venv/installed
	mkdir -p build
	$(BIN)/python bench/kills.py --kills 1000 --signals 300 --json $(SOAKED)
	$(BIN)/python bench/faults.py --json $(SOAKED)
	$(BIN)/python bench/flips.py --flips 10000
	COMPRESS_HEADERS=100000 $(BIN)/python -m pytest -q tests/robust/test_safetensors_library.py
	$(BIN)/python bench/determinism.py --json $(SOAKED)
	$(BIN)/python bench/memory_table.py --work build/memory --json $(SOAKED)
	$(BIN)/python bench/memory_table.py --work build/memory --giant --json $(SOAKED)

# A slice adds to those before it: docs/fuzzing.md. atheris comes with the extra `fuzz`.
FUZZ_SECONDS ?= 600
FUZZ_TARGET ?= all
fuzz: .venv/installed
	$(BIN)/python -c "import atheris" 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python bench/fuzz.py --target $(FUZZ_TARGET) --seconds $(FUZZ_SECONDS)

# PYTHONS: interpreters that are not on PATH, e.g. PYTHONS='--python 3.10=/opt/python3.10/bin/python3'.
matrix:
	$(PYTHON) bench/matrix.py $(PYTHONS)

installs: .venv/installed
	$(BIN)/python bench/installs.py

# A local version (+cpu) has the advisories of the release. --strict: what cannot be looked up fails.
AUDIT := build/audit
audit: .venv/installed
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
	  $(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; }
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > $(AUDIT)/installed.txt
	$(AUDIT)/bin/pip-audit -r $(AUDIT)/installed.txt --no-deps --disable-pip --strict \
	  --progress-spinner off

cuda: .venv/installed
	@if command -v nvcc >/dev/null; then \
	  $(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCOMPRESS_CUDA=ON \
	    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/compress/kernels && \
	  $(BIN)/cmake --build build/cuda --target _cuda; \
	else echo "make cuda: there is no nvcc on PATH: the CUDA kernels are not built"; fi

cuda-check: cuda
	PYTHONPATH=$(CURDIR) $(BIN)/python bench/cuda_check.py

clean:
	rm -rf .venv build dist demo-out *.egg-info compress/kernels/*.so .pytest_cache .mypy_cache .ruff_cache
