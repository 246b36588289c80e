# Everything runs in .venv, which the first target that needs it creates.
# Folders are named from here, or by the shell's $$PWD in quotes: no name of a folder, with spaces,
# quotes or a $ in it, is ever read as a command.
PYTHON ?= python3
BIN := .venv/bin
# Whose language the notebooks have: make lab EDITION=zh, make tutorial EDITION=zh
EDITION ?= en
# What the job of the notebooks runs too, so that both jobs take as long.
LONG := tests/test_default_run.py tests/test_notebooks.py tests/test_planning.py
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=1500 --timeout=1600

.DEFAULT_GOAL := help
.PHONY: help tutorial test test-notebooks test-package browser-test colab-test soak gguf benchmark lint lab notebooks sync clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

.venv/ready: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("tinytrain needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Installing into .venv; the first time this takes some minutes."
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[notebook,test]'
	@touch $@

tutorial: .venv/ready  ## run the notebooks and show what the trained model has learned
	@$(BIN)/python notebooks/run_all.py --edition $(EDITION)

# Two jobs of one thread each: on two cores that is faster than one job after the other.
test: .venv/ready lint  ## lint, every notebook (training included) under nbval, all tests
	@OMP_NUM_THREADS=1 $(MAKE) --jobs=2 --no-print-directory test-notebooks test-package

# Recipe pocket cut to 60 steps, whose losses must be those of the first 60 in the reference curve.
# 08 and 10, which train again, run on recipe smoke; so does the Chinese edition, whose code is the
# same, by the tutorial's own command (tests/test_notebooks.py).
test-notebooks: .venv/ready
	rm -rf build/test-runs
	TINYTRAIN_RUNS="$$PWD/build/test-runs" TINYTRAIN_RECIPE=pocket TINYTRAIN_MAX_STEPS=60 \
		$(BIN)/python -m pytest -v -n 1 $(NBVAL) notebooks/0[!8]*.ipynb
	TINYTRAIN_RUNS="$$PWD/build/test-runs" TINYTRAIN_RECIPE=smoke \
		$(BIN)/python -m pytest -v -n 1 $(NBVAL) notebooks/08*.ipynb notebooks/10*.ipynb
	TINYTRAIN_RUNS="$$PWD/build/test-runs" $(BIN)/python -m pytest -v $(LONG)

test-package: .venv/ready
	$(BIN)/python -m pytest -v -n 1 --doctest-modules $(LONG:%=--ignore=%) tests tinytrain

.venv/browser: .venv/ready
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt playwright
	@touch $@

# Needs a Chromium: apt-get install chromium, or .venv/bin/playwright install chromium
browser-test: .venv/browser  ## JupyterLab in a real browser; what it looks like is in build/screenshots
	rm -rf build/screenshots
	$(BIN)/python -m pytest -v -m browser tests/test_in_browser.py

build/colab/ready: tests/colab.txt
	"$(PYTHON)" -m venv build/colab
	build/colab/bin/python -m pip install --disable-pip-version-check -r tests/colab.txt
	@touch $@

colab-test: .venv/ready build/colab/ready  ## every notebook as in Colab: its versions, its way to install
	$(BIN)/python -m pytest -v -m colab tests/test_in_colab.py

soak: .venv/ready  ## kill a training 200 times, train 10,000 logged steps, read 2 GB in 1 GB (an hour)
	TINYTRAIN_KILLS=200 $(BIN)/python -m pytest -v -m "soak or not soak" -k "killed or soak" --timeout=3600 tests/test_kill_and_resume.py tests/test_distributed.py tests/test_big_text.py

build/llama.cpp/ready: tests/llama_cpp.txt .venv/ready
	$(BIN)/python -m pip download --disable-pip-version-check --no-deps --no-binary :all: --require-hashes --dest build/llama.cpp --requirement tests/llama_cpp.txt
	tar -xzf build/llama.cpp/llama_cpp_python-*.tar.gz -C build/llama.cpp --strip-components=1
	@touch $@

gguf: build/llama.cpp/ready  ## compare our GGUF files with those of llama.cpp's own converter
	TINYTRAIN_LLAMA_CPP="$$PWD/build/llama.cpp/vendor/llama.cpp" $(BIN)/python -m pytest -v -k converter tests/test_export.py

build/peers/ready: benchmarks/peers.txt
	"$(PYTHON)" -m venv build/peers
	build/peers/bin/python -m pip install --disable-pip-version-check -r benchmarks/peers.txt
	# Without what it lists to run its notebooks, TensorFlow among it: its models need none of that.
	build/peers/bin/python -m pip install --disable-pip-version-check --no-deps llms-from-scratch==1.0.19
	@touch $@

# On a text of one's own: make benchmark TEXT=my.jsonl
benchmark: .venv/ready build/peers/ready  ## measure all that is claimed about speed and memory (2 hours)
	$(BIN)/python -m benchmarks.tokenization $(if $(TEXT),--text "$$TEXT")
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.learning $(if $(TEXT),--text "$$TEXT")
	$(BIN)/python -m benchmarks.learning --choices --seconds 120 $(if $(TEXT),--text "$$TEXT")
	$(BIN)/python -m benchmarks.questions $(if $(TEXT),--text "$$TEXT")
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.estimate
	$(if $(TEXT),$(BIN)/python -m benchmarks.hours --text "$$TEXT")
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && $(BIN)/python -m benchmarks.gpu || true
	$(BIN)/python -m benchmarks

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# JupyterLab saves what it runs: copies are the reader's, and the checkout stays as it is. What the
# notebooks link to goes with them, into the folder that JupyterLab shows.
lab: .venv/ready  ## open JupyterLab in your own copies of the notebooks, in runs/notebooks
	@runs="$${TINYTRAIN_RUNS:-runs}"; \
	case "$$runs" in "~/"*) runs="$$HOME/$${runs#*/}";; esac; \
	mkdir -p "$$runs/notebooks/zh" "$$runs/docs"; \
	for new in notebooks/[0-9]*.ipynb notebooks/zh/[0-9]*.ipynb docs/* README*.md; do \
		copy="$$runs/$$new"; \
		[ -e "$$copy" ] || cp "$$new" "$$copy"; \
		[ ! "$$new" -nt "$$copy" ] || echo "$$new is newer than $$copy; delete yours to get it"; \
	done; \
	exec $(BIN)/python -m jupyterlab --ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir="$$runs" "$$runs/notebooks/$(if $(filter zh,$(EDITION)),zh/)01_gpu_check.ipynb"

notebooks: .venv/ready  ## run the notebooks and keep their outputs in place, to be committed
	@$(BIN)/python notebooks/run_all.py --in-place
	@$(BIN)/python notebooks/run_all.py --in-place --edition zh
	@$(BIN)/python notebooks/sync.py

sync: .venv/ready  ## carry code and outputs of the English notebooks over to the Chinese ones
	@$(BIN)/python notebooks/sync.py

clean:  ## remove .venv and what the tests made; your runs stay
	rm -rf .venv build
