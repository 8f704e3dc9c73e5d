"""Publish a trained pipeline on the Hub: its model card, with training settings and figures, and the push.

A push sends a list of files, never a whole folder, in one commit. It is retried where that can help, and otherwise
fails with one sentence.
"""

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path

from diffusers.utils import logging
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id

from .pipeline_pixel_diffusion import (
    README,
    SAMPLES,
    PixelDiffusionPipeline,
    check_token,
    component_files,
    create_repo,
    only_variant,
    pipeline_card,
    with_repo_id,
)
from .synthetic_fashion import SYNTHETIC

logger = logging.get_logger(__name__)

WAITS = (1, 4, 16)  # seconds before each new try, after a broken connection, a timeout or a temporary error
UNET_MODULE = "unet_2d_optimized"  # whose code a repository carries
TASK = {"task_type": "unconditional-image-generation", "task_name": "unconditional image generation"}

# what the Hub's client raises: refusals, broken connections, both also from its upload threads, rejected metadata
CLIENT_ERRORS = (httpx.HTTPError, OSError, RuntimeError, ValueError)


class PushError(RuntimeError):
    """A failed push; the message gives the Hub's answer and says that the folder is kept."""


def model_card(
    pipe: PixelDiffusionPipeline,
    repo_id: str,
    *,
    dataset_name: str | None = None,
    dataset_id: str | None = None,
    base_model: str | None = None,
    settings: dict | None = None,
    has_samples: bool = False,
    license: str | None = None,
) -> ModelCard:
    """The pipeline's card for `repo_id`, including what only the training knows; `.save(path)` writes it.

    Args:
        pipe: The pipeline to describe.
        repo_id: "owner/name", which the card's snippets load.
        dataset_name: As given to the training. The card names it only if it is a Hub id (no local path) or the
            built-in set.
        dataset_id: Hub id of what `dataset_name` is a local copy of; ValueError if it has not the form of one.
        base_model: The model that the training started from; named only if it is a Hub id.
        settings: Training settings, shown as a table; those that are None, or may be a path or a token, are left out.
        has_samples: Whether the repository has a grid of samples, `samples.png`.
        license: License of the model, as the Hub abbreviates it, such as "mit".
    """
    card = pipeline_card(pipe, repo_id, has_samples)
    card.data.license = license
    if dataset_id is not None and not has_form_of_hub_id(dataset_id):
        raise ValueError(f"`dataset_id` is {dataset_id!r}; it must be owner/name on the Hub, not a local path.")
    if dataset_id is None and dataset_name is not None and is_hub_id(dataset_name):
        dataset_id = dataset_name
    if dataset_id is not None:
        card.data.datasets = [dataset_id]
        training = f"Trained on [{dataset_id}](https://huggingface.co/datasets/{dataset_id})."
    elif dataset_name == SYNTHETIC:
        training = f"Trained on {SYNTHETIC}, garments that ddpm-diffusers draws itself."
    else:
        training = "Trained on images that are not on the Hub."
    if base_model is not None:
        named = is_hub_id(base_model) and "/" in base_model
        card.data.base_model = base_model if named else None
        name = f"[{base_model}](https://huggingface.co/{base_model})" if named else "a model that is not on the Hub"
        training += f" It started from the weights of {name}."
    rows = [(name, value) for name, value in (settings or {}).items() if is_publishable(name, value)]
    if rows:
        training += "\n\n" + table(("setting", "value"), rows)
    card.text = with_section(card.text, "Training", training)
    return card


def add_figures(card: str, figures: Iterable[dict]) -> str:
    """Put measured figures into a card, replacing earlier ones: `model-index` in its metadata, a table in its body.

    Args:
        card: The text of a card.
        figures: One dict per figure, of arguments for `huggingface_hub.EvalResult`: at least `dataset_type` (the data
            set's id), `dataset_name` (its display name), `metric_type` and `metric_value`; `metric_name`,
            `dataset_split` and `metric_args` (how it was measured) are shown, too. If empty, earlier ones are removed.

    Returns:
        The text of the card.

    Raises:
        ValueError: If a figure lacks a required argument, has an unknown one, has a `dataset_type` without
            the form of a Hub id, or is not finite.
    """
    results = [eval_result(figure) for figure in figures]
    card = ModelCard(card)
    title = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    card.data.eval_results = results or None
    card.data.model_name = (title[1] if title else PixelDiffusionPipeline.__name__) if results else None
    card.text = with_section(card.text, "Measured figures", figures_section(results) if results else None)
    return str(card)


def figures_section(results: list[EvalResult]) -> str:
    """A table of figures for each way in which they were measured."""
    tables = {}
    for result in results:
        on = " ".join(filter(None, (result.dataset_name, result.dataset_split)))
        how = ", ".join(f"{name} {value}" for name, value in (result.metric_args or {}).items())
        row = (result.metric_name or result.metric_type, result.metric_value)
        measured = " ".join((f"On {on}, measured with {how}:" if how else f"On {on}:").split())
        tables.setdefault(measured, []).append(row)
    return "\n\n".join(f"{measured}\n\n{table(('metric', 'value'), rows)}" for measured, rows in tables.items())


def prepare_repo(
    repo_id: str, token: str | None = None, private: bool | None = None, license: str | None = None
) -> str:
    """Create the repository if it does not exist, and check write access: before a training, not after it.

    Args:
        repo_id: "owner/name", or a name in the token's own namespace.
        token: Hub token; by default, that of `HF_TOKEN` or `hf auth login`.
        private: Whether a new repository is private; if True, an existing one must be, too.
        license: That of the model card to be pushed, which the Hub must know.

    Returns:
        The full id. If the Hub cannot be reached or has a temporary error, logs a warning and returns `repo_id` as is.

    Raises:
        PermissionError: If there is no token, or it is refused or may not write there.
        ValueError: If the token or the id is malformed, `private` is True and the repository is public, or the Hub
            does not know the license.
    """
    validate_repo_id(repo_id)
    check_token(token)
    if token is None and get_token() is None:
        raise PermissionError(
            f"There is no token of the Hub to push to {repo_id} with: run `hf auth login`, or set HF_TOKEN."
        )
    api = HfApi(token=token)
    try:
        if license is not None:
            card = ModelCard("---\n{}\n---\n")
            card.data.license = license
            card.validate()
        repo_id = create_repo(repo_id, private, token).repo_id
        api.auth_check(repo_id, write=True)
    except CLIENT_ERRORS as error:
        status, answer = describe(error, token)
        if status in (401, 402, 403, 404):
            raise PermissionError(
                f"The token must not write to {repo_id} ({answer}): name a repository of your own or of your"
                " organization, and use a token with write access to it."
            ) from None
        if not is_transient(error) and not isinstance(error, OfflineModeIsEnabled):
            raise ValueError(f"{repo_id} cannot be pushed to: {answer}.") from None
        logger.warning(f"{repo_id} could not be prepared ({answer}): the push will be tried after the training.")
    return repo_id


def push_folder(folder: str | Path, repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """Upload a saved pipeline, and no other files of its folder, in one commit (none if nothing has changed).

    Its files are the card, the grid of samples, `model_index.json`, the pipeline's code, networks and scheduler
    (configs, code and weights in safetensors), and all in the folders of further components but hidden files and
    pickles. The uploaded card's snippets load `repo_id`.

    Args:
        folder: Folder that `save_pretrained` wrote; it is only read.
        repo_id: "owner/name", or a name in the token's own namespace; created if it does not exist.
        token: Hub token; by default, that of `HF_TOKEN` or `hf auth login`.
        private: Whether a new repository is private; if True, an existing one must be, too.

    Returns:
        The repository's URL.

    Raises:
        ValueError: Before any work, if the token or the id is malformed or the folder is not a complete pipeline.
        PushError: If the push failed.
    """
    files = pipeline_files(folder)
    validate_repo_id(repo_id)
    check_token(token)
    api = HfApi(token=token)

    def push() -> str:
        repo = create_repo(repo_id, private, token)
        card = Path(folder, README)
        contents = {name: str(Path(folder, name)) for name in files}
        if card.is_file():
            contents[README] = with_repo_id(card.read_text("utf-8"), repo.repo_id, only_variant(files)).encode()
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(repo.repo_id, operations, commit_message="Upload pipeline")
        return str(repo)

    for wait in (*WAITS, None):
        try:
            return push()
        except CLIENT_ERRORS as error:
            answer = describe(error, token)[1]
            if wait is None or not is_transient(error):
                break
        logger.warning(f"The push to {repo_id} did not go through ({answer}); trying again in {wait} s.")
        time.sleep(wait)
    raise PushError(f"The push to {repo_id} failed: {answer}. {folder} is kept")


def pipeline_files(folder: str | Path) -> list[str]:
    """The files of a folder that make up the pipeline, as relative paths; ValueError if a part is missing."""
    folder = Path(folder)
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is no folder of a saved pipeline, with a readable model_index.json ({error}): give the folder"
            " that `save_pretrained` or the training wrote."
        ) from error
    root = [README, SAMPLES, "model_index.json"]
    if isinstance(index.get("_class_name"), list):
        root.append(f"{index['_class_name'][0]}.py")
        if not (folder / root[-1]).is_file():
            raise ValueError(f"{folder} lacks {root[-1]}, the pipeline's code: save it again.")
    files = [name for name in root if (folder / name).is_file()]
    for name, value in index.items():
        if not name.isidentifier() or name.startswith("_") or not isinstance(value, list):
            continue
        if value[0] is None and name in ("unet", "scheduler"):
            raise ValueError(f"{folder} was saved without its `{name}`: set it in the pipeline, and save it again.")
        if value[0] is None:
            continue
        found = component_files(folder / name)
        if not found or ("config.json" in found and not any(file.endswith(".safetensors") for file in found)):
            raise ValueError(f"{folder} lacks {'the weights' if found else 'all files'} of `{name}`: save it again.")
        if value[0] == UNET_MODULE and f"{UNET_MODULE}.py" not in found:
            raise ValueError(f"{folder} lacks {name}/{UNET_MODULE}.py, the network's code: save it again.")
        files += [f"{name}/{file}" for file in found]
    return files


def describe(error: Exception, token: str | None) -> tuple[int | None, str]:
    """The HTTP status of the Hub's answer, if there was one, and a readable text, in which the token never appears."""
    error = cause(error)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status is not None:
        text = f"the Hub answered {status} {error.server_message or error.response.reason_phrase}"
    elif isinstance(error, OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE is set"
    elif isinstance(error, httpx.HTTPError):
        text = f"the Hub cannot be reached: {type(error).__name__} {error}"
    else:
        text = str(error)
    secret = token or get_token()
    return status, " ".join((text.replace(secret, "<token>") if secret else text).split()).rstrip(".")


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed a little later."""
    error = cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 409, 412, 429) or error.response.status_code >= 500
    # a proxy's page instead of JSON is a JSONDecodeError; Xet's client raises a RuntimeError or a ConnectionError
    transient = (httpx.HTTPError, ConnectionError, TimeoutError, RuntimeError, json.JSONDecodeError)
    return isinstance(error, transient) and not isinstance(error, OfflineModeIsEnabled)


def cause(error: Exception) -> Exception:
    """The HTTP error behind that of an upload thread; any other error as it is."""
    in_thread = isinstance(error, RuntimeError) and isinstance(error.__cause__, httpx.HTTPError)
    return error.__cause__ if in_thread else error


def eval_result(figure: dict) -> EvalResult:
    try:
        # like a card's YAML, JSON takes only Python's own numbers; `allow_nan=False` refuses non-finite ones
        result = EvalResult(**{**TASK, **json.loads(json.dumps(figure, allow_nan=False))})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{figure!r} is no figure ({error}): it needs finite arguments of EvalResult.") from error
    if not has_form_of_hub_id(result.dataset_type):
        raise ValueError(f"`dataset_type` is {result.dataset_type!r}; it must be an id of the Hub, not a local path.")
    return result


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id, and is neither a local path nor the built-in set."""
    return has_form_of_hub_id(name) and not Path(name).exists()


def has_form_of_hub_id(name: str) -> bool:
    """Whether `name` could be a Hub id. Unlike `is_hub_id`, it does not mind a local folder of that name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name != SYNTHETIC


def is_publishable(name: str, value) -> bool:
    """Whether a setting can be made public: neither a token nor anything that may be a local path."""
    if "token" in name or name.endswith("_dir"):
        return False
    if isinstance(value, (list, tuple)):
        return all(is_publishable(name, part) for part in value)
    if isinstance(value, str):
        return not re.search(r"^hf_|[/\\~]", value)  # a token, or maybe a path
    return isinstance(value, (bool, int, float))


def table(header: tuple, rows: Iterable[tuple]) -> str:
    rows = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def with_section(text: str, heading: str, body: str | None) -> str:
    """A card's text with this section, before `## Limits` or else at the end, in place of any of the same heading.

    If `body` is None, that one is only removed.
    """
    text = re.sub(rf"^## {heading}\n.*?(?=^##? |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    if body is None:
        return text
    before, *limits = re.split(r"^(?=## Limits\n)", text, maxsplit=1, flags=re.MULTILINE)
    return f"{before.rstrip()}\n\n## {heading}\n\n{body}\n" + "".join(f"\n{section}" for section in limits)
