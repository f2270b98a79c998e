# Two commands: `make demo` sets everything up and runs the main job; `make test` runs every check.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
LMMS ?= .venv-lmms
OPEN_CLIP ?= .venv-open_clip
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The tests that also run on the oldest supported transformers: pruned ≡ masked, every strategy of generate, gradients, threads.
CORE := $(addprefix tests/promises/test_,exact.py generate.py conversations.py threads.py gradients.py server.py) tests/test_oldest.py
# Part of it, for time: the two LLaVA families, and LLaVA-NeXT for gradients and threads only.
LESS := -k "not qwen and not keeps_nothing and not (llava_next and (test_exact or test_generate or test_conversations))"
# Of the family matrix, two cells for each family.
MATRIX := tests/families/test_matrix.py -k test_cell
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test coverage test-oldest test-lmms test-open_clip lint test-families test-generation test-static test-video test-pixels
demo: $(STAMP)
	$(BIN)/vlmprune demo

test: $(STAMP) lint test-oldest test-lmms test-open_clip
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) --durations 15

# Lines that no test of the main suite runs; it fails under 95 %. On its own, because watching lines takes a quarter more time.
coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) --cov --cov-report=term --cov-fail-under=95

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 VLMPRUNE_OLDEST=1 $(OLDEST)/bin/python $(PYTEST) -p no:cacheprovider $(LESS) $(CORE)
	OMP_NUM_THREADS=1 VLMPRUNE_FAMILIES=oldest $(OLDEST)/bin/python $(PYTEST) -p no:cacheprovider $(MATRIX)

# The plugin into lmms-eval, and the real lmms-eval command, offline.
test-lmms: $(LMMS)/.installed
	OMP_NUM_THREADS=1 $(LMMS)/bin/python $(PYTEST) -p no:cacheprovider tests/lmms

# Image towers of open_clip, with random weights; and what needs torchvision.
test-open_clip: $(OPEN_CLIP)/.installed
	OMP_NUM_THREADS=1 VLMPRUNE_OPEN_CLIP=1 $(OPEN_CLIP)/bin/python $(PYTEST) -p no:cacheprovider \
		tests/image_towers/test_open_clip*.py tests/with_torchvision

# All cells of the family matrix, of which `make test` runs a third; writes docs/families.md and the table of README.md.
test-families: $(STAMP) $(OLDEST)/.installed
	OMP_NUM_THREADS=1 VLMPRUNE_FAMILIES=all VLMPRUNE_MATRIX=docs/results/families.json $(BIN)/python $(PYTEST) tests/families --ignore tests/families/test_page.py
	OMP_NUM_THREADS=1 VLMPRUNE_FAMILIES=oldest VLMPRUNE_MATRIX=docs/results/families-oldest.json \
		$(OLDEST)/bin/python $(PYTEST) -p no:cacheprovider $(MATRIX)
	$(BIN)/python tests/families/matrix.py

# All families with all stages before the vision tower, of which `make test` runs a third.
test-pixels: $(STAMP)
	OMP_NUM_THREADS=1 VLMPRUNE_PIXELS=all $(BIN)/python $(PYTEST) tests/pixels

# All cells of the video matrix, and every method on every video, of which `make test` runs a part; writes docs/families.md, too.
test-video: $(STAMP)
	OMP_NUM_THREADS=1 VLMPRUNE_VIDEO=all VLMPRUNE_VIDEO_MATRIX=docs/results/families-video.json $(BIN)/python $(PYTEST) tests/video
	$(BIN)/python tests/families/matrix.py

# All cells of the ways of generating, of which `make test` runs a sixteenth; writes docs/generation.md.
test-generation: $(STAMP)
	OMP_NUM_THREADS=1 VLMPRUNE_GENERATION=all VLMPRUNE_WAYS=docs/results/generation.json $(BIN)/python $(PYTEST) tests/generation/test_ways.py
	$(BIN)/python tests/generation/page.py

# Static caches and compiled decoding: all cells of the family matrix, of which `make test` runs a few.
test-static: $(STAMP)
	OMP_NUM_THREADS=1 VLMPRUNE_STATIC=all $(BIN)/python $(PYTEST) tests/generation/test_static.py tests/generation/test_compiled.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs once, and again when the list of packages changes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The other environments have some packages of their own, and find all others in .venv: nothing large is installed twice.
define beside
	$(BIN)/python -m venv --clear $(1)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/everything_else.pth"
endef

$(OLDEST)/.installed: $(STAMP) constraints-oldest.txt
	$(call beside,$(OLDEST))
	$(OLDEST)/bin/pip install --quiet --requirement constraints-oldest.txt
	touch $@

$(LMMS)/.installed: $(STAMP) requirements-lmms.txt
	$(call beside,$(LMMS))
	$(LMMS)/bin/pip install --quiet --constraint constraints.txt --requirement requirements-lmms.txt
	$(LMMS)/bin/pip install --quiet --no-deps lmms-eval==0.7.3
	touch $@

# The torchvision of PyPI is built for CUDA: beside a torch for CPUs, a file lets it be imported.
$(OPEN_CLIP)/.installed: $(STAMP) requirements-open_clip.txt tests/image_towers/torchvision_beside_cpu.py
	$(call beside,$(OPEN_CLIP))
	$(OPEN_CLIP)/bin/pip install --quiet --no-deps --requirement requirements-open_clip.txt
	cp tests/image_towers/torchvision_beside_cpu.py $(OPEN_CLIP)/lib/python3*/site-packages/
	echo "import torchvision_beside_cpu" > "$$(echo $(OPEN_CLIP)/lib/python3*/site-packages)/torchvision_beside_cpu.pth"
	touch $@
