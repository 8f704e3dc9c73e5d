# Everything from a fresh machine with Python >= 3.10 and git: `make quickstart`, `make test`.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: quickstart test test-slow quality style

# installed once; again only when what is installed changes
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,eval,test,dev]"
	touch $@

quickstart: .venv/installed
	$(BIN)/python train_scripts/generate.py --model pretrained/ddpm-fashion-mnist-28 \
		--scheduler dpmsolver++:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true --num_inference_steps 15 --guidance_scale 1.4 --num_images 64 --output_dir runs/pretrained-samples --overwrite
	$(BIN)/accelerate launch --config_file train_scripts/accelerate/cpu.yaml train_scripts/train_unconditional.py \
		train_scripts/configs/quickstart.yaml --overwrite_output_dir

test: .venv/installed
	$(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow --dist load

quality: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
